# SPDX-License-Identifier: Apache-2.0
"""A sharded layer under torch.compile computes what it computes without. What cannot be traced breaks the graph."""

import hyperep_torch as hep
import pytest
import torch
from torch.distributed.tensor import DTensor

import hyperep
from hyperep.moe import MoE


def _compiled_and_not(platform, dtype="float32"):
    """Largest difference of outputs and gradients, relative, of a layer before and after it is compiled."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    torch.manual_seed(platform.rank)
    layer = MoE(platform, dim=8, hidden_dim=16, num_experts=4, top_k=2).to(getattr(torch, dtype))
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    x = torch.randn(10, 8, dtype=getattr(torch, dtype), requires_grad=True)
    cotangent = torch.randn_like(x)

    def results(function):
        out = function(x)
        gradients = torch.autograd.grad(out, [x, *layer.parameters()], cotangent)
        return [out, *(g.to_local() if isinstance(g, DTensor) else g for g in gradients)]

    plain = results(layer)
    torch._dynamo.reset()
    compiled = results(torch.compile(layer, backend="eager"))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(compiled, plain, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank(platform, dtype):
    assert _compiled_and_not(platform, dtype) < 1e-6


def test_two_ranks(two):
    # The compiler is loaded and runs on each of them, which takes minutes on a busy machine.
    assert max(two.run(_compiled_and_not, deadline=250)) < 1e-6


@pytest.mark.parametrize(
    "make", [lambda p: MoE(p, 8, 16, 4, 2), lambda p: hep.MoE(8, 16, 4, 2)], ids=["neutral", "torch"]
)
def test_a_sharded_layer_is_one_break(platform, make):
    """What is before the experts and after them is compiled; twenty pieces in between would be slower than none."""
    layer = make(platform)
    hep.ExpertParallel().apply(layer.experts, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    torch._dynamo.reset()
    found = torch._dynamo.explain(layer)(torch.randn(10, 8))
    assert found.graph_break_count == 1, found.break_reasons
