# SPDX-License-Identifier: Apache-2.0
"""Audit the two expert parallelisms of transformers, on a block of Qwen3-MoE.

pip install transformers
hyperep audit run --subject transformers_moe:all_to_all --world-size 1,2,4
hyperep audit run --subject transformers_moe:all_reduce --world-size 1,2,4
"""

import functools
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from hyperep_torch.audit import ModuleSubject
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hyperep.audit import Claims

PLAN = {
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}


def build(claims, implementation, experts="grouped_mm"):
    """The block on this rank: what ``from_pretrained`` does with a ``DistributedConfig``, to one block."""
    sizes, world = claims.sizes, dist.get_world_size()
    config = Qwen3MoeConfig(
        hidden_size=sizes.dim,
        moe_intermediate_size=sizes.hidden,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=claims.normalize,
    )
    config._experts_implementation = experts
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    everyone = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "alone"))
    tp = everyone["ep"] if claims.batch == "shared" else everyone["alone"]
    if world > 1:
        apply_expert_parallelism(block, everyone["ep"], tp, PLAN, implementation)
    return block


def make_all_to_all(claims):
    """Every rank has tokens of its own, which travel."""
    return build(claims, "all_to_all")


def make_all_reduce(claims):
    """All ranks have the same tokens; outputs are summed."""
    return build(claims, "all_reduce")


def make_all_reduce_eager(claims):
    """The same with the models' own loop over experts, which transformers takes where grouped products cannot run."""
    return build(claims, "all_reduce", "eager")


def call(block, tokens):
    """It takes batches of sequences."""
    out = block(tokens[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def fused(weights):
    """Its layout: gate and up in one."""
    return {
        "gate.weight": weights["router"],
        "experts.gate_up_proj": np.concatenate([weights["w1"], weights["w3"]], axis=1),
        "experts.down_proj": weights["w2"],
    }


def split(arrays):
    """The way back."""
    w1, w3 = np.split(arrays["experts.gate_up_proj"], 2, axis=1)
    return {"router": arrays["gate.weight"], "w1": w1, "w2": arrays["experts.down_proj"], "w3": w3}


subject = functools.partial(
    ModuleSubject, call=call, names={}, to_layer=fused, from_layer=split, packages=("transformers",)
)
all_to_all = subject(
    name="transformers, all_to_all",
    make=make_all_to_all,
    claims=Claims(replicated="own", initial=False),  # FSDP reduces what is replicated, elsewhere
)
all_reduce = subject(
    name="transformers, all_reduce",
    make=make_all_reduce,
    claims=Claims(batch="shared", initial=False),
)
all_reduce_eager = replace(all_reduce, name="transformers, all_reduce, eager experts", make=make_all_reduce_eager)
