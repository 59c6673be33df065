# SPDX-License-Identifier: Apache-2.0
"""Audit DeepSpeed's mixture-of-experts layer on the CPU, without its engine.

pip install deepspeed
hyperep audit run --subject deepspeed_moe:dropless --world-size 1,2,4
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.moe.layer import MoE
from hyperep_torch.audit import ModuleSubject
from torch import nn

from hyperep.audit import Claims, Sizes


class Expert(nn.Module):
    """DeepSpeed leaves the expert's network to its user."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Parameter(torch.randn(hidden, dim)), nn.Parameter(torch.randn(hidden, dim))
        self.w2 = nn.Parameter(torch.randn(dim, hidden))

    def forward(self, x):
        """Rows of any leading dims."""
        return (F.silu(x @ self.w1.T) * (x @ self.w3.T)) @ self.w2.T


def make(claims):
    """The layer on this rank, nothing dropped, and no noise."""
    if not comm.is_initialized():
        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    sizes = claims.sizes
    layer = MoE(
        sizes.dim,
        Expert(sizes.dim, sizes.hidden),
        num_experts=sizes.experts,
        ep_size=dist.get_world_size(),
        k=sizes.top_k,
        min_capacity=0,  # or top-1 refuses batches of fewer tokens than that
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    return layer


def call(layer, tokens):
    """Its other results are a loss and a count."""
    return layer(tokens)[0]


dropless = ModuleSubject(
    name="DeepSpeed's MoE, top-2",
    make=make,
    call=call,
    names={
        "router": "deepspeed_moe.gate.wg.weight",
        **{name: f"deepspeed_moe.experts.deepspeed_experts.{{}}.{name}" for name in ("w1", "w2", "w3")},
    },
    packages=("deepspeed",),
    # Its engine reduces gradients, and copies of one expert are its user's to draw anew.
    claims=Claims(sizes=Sizes(top_k=2), replicated="own", initial=False),
)
top_1 = replace(
    dropless,
    name="DeepSpeed's MoE, top-1",
    claims=replace(dropless.claims, sizes=Sizes(top_k=1), normalize=False),
)
top_3 = replace(dropless, name="DeepSpeed's MoE, top-3", claims=replace(dropless.claims, sizes=Sizes(top_k=3)))
