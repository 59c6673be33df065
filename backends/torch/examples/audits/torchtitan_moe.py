# SPDX-License-Identifier: Apache-2.0
"""Audit torchtitan's mixture-of-experts layer under its ExpertParallel, on the CPU.

pip install torchtitan
hyperep audit run --subject torchtitan_moe:scores_on_outputs --world-size 1,2,4
"""

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from hyperep_torch.audit import ModuleSubject
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torchtitan.distributed.expert_parallel import ExpertParallel
from torchtitan.models.moe import MoE, MoEArgs, utils

from hyperep.audit import Claims

_histc = torch.histc


def _histc_on_cpu(x, bins=100, min=0, max=0):
    """Counts of integers, for which PyTorch has no such kernel on the CPU."""
    if x.is_floating_point() or x.device.type != "cpu":
        return _histc(x, bins=bins, min=min, max=max)
    return torch.bincount(x.flatten(), minlength=bins)


# The layer is made for GPUs. Two kernels are replaced, by PyTorch's other one and by torchtitan's own for the CPU.
torch.histc = _histc_on_cpu
utils.generate_permute_indices = functools.partial(utils.generate_permute_indices, use_cpu=True)


def make(claims):
    """The layer on this rank, with its experts sharded; products of a loop, because grouped ones are for GPUs."""
    sizes = claims.sizes
    settings = MoEArgs(
        num_experts=sizes.experts,
        num_shared_experts=1,
        score_func=claims.scores,
        route_norm=claims.normalize,
        score_before_experts=claims.weighting == "input",
        top_k=sizes.top_k,
        use_grouped_mm=False,
        load_balance_coeff=None,
    )
    layer = MoE(settings, sizes.dim, sizes.hidden)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    if dist.get_world_size() > 1:
        parallelize_module(layer.experts, mesh, ExpertParallel())
    with torch.no_grad():
        layer.init_weights(0.02, torch.device("cpu"))
    return layer


def call(layer, tokens):
    """It takes batches of sequences."""
    return layer(tokens[None])[0]


NAMES = {"router": "router.gate.weight"}
NAMES |= {name: f"experts.{name}" for name in ("w1", "w2", "w3")}
NAMES |= {f"shared_{name}": f"shared_experts.{name}.weight" for name in ("w1", "w2", "w3")}

scores_on_outputs = ModuleSubject(
    name="torchtitan's MoE, scores on outputs",
    make=make,
    call=call,
    names=NAMES,
    packages=("torchtitan",),
    # Gradients of what is replicated are reduced by FSDP, elsewhere.
    claims=Claims(shared=True, replicated="own", scores="sigmoid", normalize=True, initial=False),
)
scores_on_inputs = replace(
    scores_on_outputs,
    name="torchtitan's MoE, scores on inputs",
    claims=replace(scores_on_outputs.claims, weighting="input", normalize=False),
)
