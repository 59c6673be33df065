# SPDX-License-Identifier: Apache-2.0
"""Layers in chunks among PyTorch's own tools: recompute, FSDP2, autocast, copies, inference."""

import copy
import functools
import sys
from pathlib import Path

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import chunk_cases

DIM, HIDDEN, EXPERTS, TOP_K = 8, 6, 4, 2


@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("case", chunk_cases.CASES)
def test_neutral_cases(request, world, case):
    request.getfixturevalue(world).run(case)


def _layer(chunks, shared=1, seed=0):
    torch.manual_seed(seed)
    layer = hep.MoE(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K, num_shared_experts=shared)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("ep",))
    hep.ExpertParallel(chunks=chunks).apply(layer.experts, mesh)
    return layer


def _tokens(rank, count=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5 + rank)
    # One rank has fewer tokens than there are chunks.
    return torch.randn((count, 2)[rank % 2], DIM, generator=generator, dtype=dtype).requires_grad_()


def _gradients(layer, x, call=None, amount=1.0):
    layer.zero_grad()
    x.grad = None
    out = (layer if call is None else call)(x)
    (out.float().square().sum() * amount).backward()
    whole = {name: p.grad for name, p in layer.named_parameters()}
    local = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in whole.items()}
    return {"output": out.detach(), "tokens": x.grad, **{k: v.clone() for k, v in local.items()}}


def _agree(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if not want.numel():  # FSDP2 has left nothing to this rank
            continue
        assert want.abs().max() > 1e-3, name
        torch.testing.assert_close(
            found[name], want, rtol=tolerance, atol=tolerance * float(want.abs().max()), msg=name
        )


def _recompute(platform, reentrant):
    x = _tokens(platform.rank)
    wanted = _gradients(_layer(1), x)
    layer = _layer(3)
    found = _gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    _agree(found, wanted)
    # And in a block in which the layer is not last, so that recompute may stop early.
    _agree(_gradients(layer, x, lambda x: checkpoint(lambda x: layer(x) * 1.0, x, use_reentrant=reentrant)), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute(two, reentrant):
    two.run(_recompute, reentrant)


def _accumulated(platform):
    x = _tokens(platform.rank)
    wanted = _gradients(_layer(1), x)
    layer = _layer(2)
    layer(x).float().square().sum().backward()
    layer(x).float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        torch.testing.assert_close(gradient, 2 * wanted[name])


def test_gradients_accumulate(two):
    two.run(_accumulated)


def _frozen(platform, part):
    x = _tokens(platform.rank)
    found = []
    for chunks in (1, 3):
        layer = _layer(chunks)
        getattr(layer, part).requires_grad_(False)
        layer(x).float().square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        assert all((g is None) == name.startswith(part) for name, g in grads.items()), grads.keys()
        found.append({n: g.to_local() if isinstance(g, DTensor) else g for n, g in grads.items() if g is not None})
    _agree(found[1], found[0])


@pytest.mark.parametrize("part", ["experts", "shared_experts", "router"])
def test_frozen_parts(two, part):
    two.run(_frozen, part)


def _copied(platform):
    x = _tokens(platform.rank)
    layer = _layer(2)
    wanted = _gradients(layer, x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    _agree(_gradients(other, x), wanted)


def test_a_deep_copy_has_weights_of_its_own(two):
    two.run(_copied)


def _in_autocast(platform):
    x = _tokens(platform.rank)
    found = []
    for chunks in (1, 2):
        layer = _layer(chunks)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(_gradients(layer, x))
    _agree(found[1], found[0], 3e-2)


@pytest.mark.composes("autocast", "bfloat16, with and without chunks")
def test_autocast(two):
    two.run(_in_autocast)


def _without_gradients(platform):
    x = _tokens(platform.rank)
    wanted = _layer(1)(x).detach()
    layer = _layer(3)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = layer(x)
        assert not out.requires_grad
        torch.testing.assert_close(out.clone(), wanted)


def test_inference(two):
    two.run(_without_gradients)


def _twice(platform):
    layer, x = _layer(2), _tokens(platform.rank)
    out = layer(x).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="chunks=1"):
        out.backward()


def test_a_second_backward_is_refused(two):
    two.run(_twice)


def _selective(platform):
    layer, saved = _layer(2), [torch.ops._c10d_functional.all_to_all_single.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    out = checkpoint(layer, _tokens(platform.rank), use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="Trying to backward an extra time"):
        out.sum().backward()


@pytest.mark.composes(
    "recompute",
    "selective with `chunks=2`, and `all_to_all_single` in the list, is refused in PyTorch's words: "
    '"Trying to backward an extra time"',
)
def test_selective_recompute_is_refused(two):
    two.run(_selective)


def _inputs_first(platform):
    layer, x = _layer(2), _tokens(platform.rank)
    out = layer(x).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="chunks=1"):
        torch.autograd.grad(out, list(layer.parameters()))


@pytest.mark.composes(
    "pipelines",
    "with `chunks=2` a backward for inputs and then one for weights, as schedules without bubbles run them, is "
    'refused: "apply the style with chunks=1"',
)
def test_backward_for_inputs_and_then_for_weights_is_refused(two):
    two.run(_inputs_first)


def _under_fsdp(platform):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    found = []
    for chunks in (1, 3):
        torch.manual_seed(1)
        layer = hep.MoE(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K, num_shared_experts=1)
        model = nn.Sequential(nn.Linear(DIM, DIM), layer, nn.Linear(DIM, DIM))
        hep.ExpertParallel(chunks=chunks).apply(layer.experts, mesh["ep"])
        hep.fully_shard(model, mesh, blocks="1")
        x = _tokens(platform.rank)
        steps = []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(3):
            steps.append(_gradients(model, x, amount=10.0))
            optimizer.step()
        found.append(steps)
    for one, other in zip(found[1], found[0], strict=True):
        _agree(one, other, 1e-4)


@pytest.mark.composes("FSDP2", "`chunks=3`")
def test_under_fsdp(four):
    four.run(_under_fsdp)


def _gathered_below(platform):
    class Scaled(nn.Module):
        takes = "tokens"

        def __init__(self):
            super().__init__()
            self.inner = hep.GroupedExperts(DIM, HIDDEN, EXPERTS)

        def forward(self, *inputs):
            return self.inner(*inputs)

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    experts = hep.ExpertParallel(chunks=2).apply(Scaled(), mesh["ep"])
    fully_shard(experts.inner, mesh=mesh["efsdp"])
    x = _tokens(0)
    choices, weights = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    with pytest.raises(ValueError, match=r"\['experts\.inner'\] by themselves"):
        experts(x, choices, weights)
    layer = _layer(2)
    fully_shard(layer.shared_experts, mesh=mesh["efsdp"])
    with pytest.raises(ValueError, match=r"\['meanwhile'\] by themselves"):
        layer(x)


def test_parts_that_are_gathered_by_themselves_are_refused(two):
    two.run(_gathered_below)


def _compiled(platform):
    x = _tokens(platform.rank)
    layer = _layer(2)
    wanted = _gradients(layer, x)
    _agree(_gradients(layer, x, torch.compile(layer, backend="aot_eager")), wanted)


def test_compiled_around(two):
    two.run(_compiled)
