# SPDX-License-Identifier: Apache-2.0
"""A sharded layer under torch.compile computes what it computes without. What cannot be traced breaks the graph."""

import subprocess
import sys

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

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled, worst = torch.compile(layer, backend="aot_eager"), 0.0
    for scale in (1.0, -0.5):
        # What was traced the first time must not be what is computed the second time.
        with torch.no_grad():
            x.mul_(scale)
            for parameter in layer.parameters():
                parameter.mul_(scale)
        pairs = zip(results(compiled), results(layer), strict=True)
        worst = max(worst, *(((a - b).norm() / b.norm()).item() for a, b in pairs))
    assert counters["unique_graphs"], "nothing was compiled"
    return worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank(platform, dtype):
    assert _compiled_and_not(platform, dtype) < 1e-6


def test_two_ranks(two):
    # The compiler is loaded and runs on each of them, which takes minutes on a busy machine.
    assert max(two.run(_compiled_and_not, deadline=250)) < 1e-6


LAYERS = {"neutral": lambda p: MoE(p, 8, 16, 4, 2), "torch": lambda p: hep.MoE(8, 16, 4, 2)}


def _gradients(function, layer, x):
    out = function(x)
    return [out, *torch.autograd.grad(out.float().pow(2).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.composes(
    "`torch.compile`",
    "a layer that is not sharded: `fullgraph=True`, one graph for all numbers of tokens",
)
def test_a_whole_layer_is_one_graph(platform, make, backend):
    """Also where it has not run before; and the graph serves any number of tokens, once it has seen two."""
    layer = make(platform)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    # Not imported above: that would import Triton before its own tests have asked for the interpreter.
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for count in (10, 11, 13, 5):
        x = torch.randn(count, 8, requires_grad=True)
        for found, wanted in zip(_gradients(compiled, layer, x), _gradients(layer, layer, x), strict=True):
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert counters["unique_graphs"] == 2


def test_experts_alone_are_one_graph(platform):
    experts = hep.GroupedExperts(8, 16, 4)
    x, sizes = torch.randn(9, 8, requires_grad=True), torch.tensor([4, 0, 3, 2])
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    found, wanted = (_gradients(lambda x, f=f: f(x, sizes), experts, x) for f in (compiled, experts))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    with pytest.raises(ValueError, match=r"end at 10, but there are 9 rows"):
        compiled(x, torch.tensor([4, 0, 3, 3]))


@pytest.mark.composes("`torch.export`", "a layer that is not sharded, with a dynamic number of tokens")
def test_a_whole_layer_is_exported():
    layer = hep.MoE(8, 16, 4, 2)
    tokens = torch.export.Dim("tokens", min=2, max=100)
    exported = torch.export.export(layer, (torch.randn(10, 8),), dynamic_shapes=({0: tokens},)).module()
    for count in (10, 31):
        x = torch.randn(count, 8)
        assert (exported(x) - layer(x)).abs().max() < 1e-6


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.composes(
    "`torch.compile`",
    "a sharded layer: one graph break, because only the host knows how many tokens come",
)
def test_a_sharded_layer_is_one_break(platform, make):
    """What is before the experts and after them is compiled; twenty pieces in between would be slower than none."""
    layer = make(platform)
    hep.ExpertParallel().apply(layer.experts, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    torch._dynamo.reset()
    found = torch._dynamo.explain(layer)(torch.randn(10, 8))
    assert found.graph_break_count == 1, found.break_reasons


def test_the_compiler_is_imported_by_what_is_compiled_alone():
    """It takes seconds, and brings Triton along before anybody could choose its interpreter."""
    code = (
        "import sys, torch, hyperep, hyperep_torch as hep, hyperep_torch.platform\n"
        "layer, style = hep.MoE(8, 16, 4, 2), hep.ExpertParallel()\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "print([name for name in ('torch._dynamo', 'triton') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_a_compiled_module_sees_the_tensors_that_a_call_gives_it(platform):
    """Before the call, in it and after it: no graph was compiled for the others' tensors."""
    experts = hep.GroupedExperts(8, 16, 4)
    x, sizes = torch.randn(9, 8), torch.tensor([4, 0, 3, 2])
    zeros = {name: torch.zeros_like(p) for name, p in experts.named_parameters()}
    wanted = experts(x, sizes)
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager")
    for _ in range(2):
        assert (compiled(x, sizes) - wanted).abs().max() < 1e-6
        assert not platform.functional_call(experts, zeros, compiled, x, sizes).any()
