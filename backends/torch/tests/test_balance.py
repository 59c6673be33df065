# SPDX-License-Identifier: Apache-2.0
"""Balanced experts among PyTorch's own tools, under a load that copies experts at every step."""

import copy

import hyperep_torch as hep
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import hyperep
from hyperep.exchange import balance as planner

DIM, HIDDEN, EXPERTS, TOP_K = 8, 6, 8, 2
EVEN = hyperep.Balance(slots=2, max_imbalance=1.0, rows_per_copy=0)


class Theirs(nn.Module):
    """Experts of somebody else: weights that lie the other way round, biases, and a module below."""

    takes = "tokens"

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, DIM, HIDDEN))
        self.bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
        self.down = nn.ParameterDict({"w": nn.Parameter(torch.empty(EXPERTS, HIDDEN, DIM))})

    def forward(self, tokens, indices, weights):
        out = torch.zeros_like(tokens)
        for e in range(self.up.shape[0]):
            hidden = F.gelu(tokens @ self.up[e] + self.bias[e])
            out = out + (weights * (indices == e)).sum(1, keepdim=True) * (hidden @ self.down["w"][e])
        return out


def _layer(balance, theirs=False, seed=0):
    torch.manual_seed(seed)
    layer = hep.MoE(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K, num_shared_experts=1)
    if theirs:
        layer.experts = Theirs()
        layer.forward = lambda x: _routed(layer, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        # One expert is everybody's favourite.
        layer.router.gate[1] = 3 * layer.router.gate[1] + 0.7
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("ep",))
    hep.ExpertParallel(balance=balance).apply(layer.experts, mesh)
    return layer


def _routed(layer, x):
    routing = layer.router(x)
    return layer.experts(x, routing.experts, routing.scores)


def _tokens(rank, count=14):
    generator = torch.Generator().manual_seed(5 + rank)
    return (torch.randn((count, 5)[rank % 2], DIM, generator=generator) + 0.3).requires_grad_()


def _gradients(layer, x, call=None):
    layer.zero_grad()
    x.grad = None
    out = (layer if call is None else call)(x)
    out.float().square().sum().backward()
    local = {n: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for n, p in layer.named_parameters()}
    return {"output": out.detach(), "tokens": x.grad, **{n: g.clone() for n, g in local.items() if g is not None}}


def _agree(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        if want.numel():
            atol = tolerance * max(float(want.abs().max()), 1e-2)
            torch.testing.assert_close(found[name], want, rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def _copying(function):
    """The result of *function*, which must have copied experts."""
    seen = []
    original = planner.plan

    def noting(*arguments, **options):
        seen.append(original(*arguments, **options))
        return seen[-1]

    planner.plan = noting
    try:
        result = function()
    finally:
        planner.plan = original
    assert seen
    assert all(placement.copies for placement in seen)
    return result


def _plain(platform, theirs):
    x = _tokens(platform.rank)
    wanted = _gradients(_layer(None, theirs), x)
    layer = _layer(EVEN, theirs)
    _agree(_copying(lambda: _gradients(layer, x)), wanted)
    # A step, and once more: copies have the weights of the step.
    for of, reference in ((layer, _layer(None, theirs)),):
        for _ in range(3):
            found, expected = _gradients(of, x), _gradients(reference, x)
            _agree(found, expected, 1e-4)
            for model in (of, reference):
                torch.optim.SGD(model.parameters(), lr=0.01).step()


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("world", ["two", "four"])
def test_gradients_and_steps(request, world, theirs):
    request.getfixturevalue(world).run(_plain, theirs)


def _recompute(platform, reentrant):
    x = _tokens(platform.rank)
    wanted = _gradients(_layer(None), x)
    layer = _layer(EVEN)
    call = lambda x: checkpoint(layer, x, use_reentrant=reentrant)  # noqa: E731
    _agree(_copying(lambda: _gradients(layer, x, call)), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute(two, reentrant):
    two.run(_recompute, reentrant)


def _frozen(platform):
    x = _tokens(platform.rank)
    found = []
    for balance in (None, EVEN):
        layer = _layer(balance)
        layer.experts.requires_grad_(False)
        found.append(_gradients(layer, x))
    assert not any(name.startswith("experts") for name in found[0])
    _agree(found[1], found[0])


def test_frozen_experts_send_no_gradients_home(two):
    two.run(_frozen)


def _copied(platform):
    x = _tokens(platform.rank)
    layer = _layer(EVEN)
    wanted = _gradients(layer, x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    _agree(_gradients(other, x), wanted)


def test_a_deep_copy_lends_its_own_weights(two):
    two.run(_copied)


def _under_fsdp(platform):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    found = []
    for balance in (None, EVEN):
        torch.manual_seed(1)
        layer = hep.MoE(DIM, HIDDEN, num_experts=EXPERTS, top_k=TOP_K)
        model = nn.Sequential(nn.Linear(DIM, DIM), layer, nn.Linear(DIM, DIM))
        hep.ExpertParallel(balance=balance).apply(layer.experts, mesh["ep"])
        hep.fully_shard(model, mesh, blocks="1")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        steps = []
        for _ in range(3):
            steps.append(_gradients(model, _tokens(platform.rank)))
            optimizer.step()
        found.append(steps)
    for one, other in zip(found[1], found[0], strict=True):
        _agree(one, other, 1e-3)


def test_under_fsdp(four):
    four.run(_under_fsdp)


def _inference(platform):
    x = _tokens(platform.rank)
    wanted, layer = _layer(None)(x).detach(), _layer(EVEN)
    with torch.no_grad():
        torch.testing.assert_close(_copying(lambda: layer(x)), wanted)


def test_inference(two):
    two.run(_inference)


def _refused(platform):
    experts = hep.GroupedExperts(DIM, HIDDEN, EXPERTS)
    experts.register_buffer("scale", torch.ones(EXPERTS))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    with pytest.raises(ValueError, match=r"\['scale'\] have an entry for each expert"):
        hep.ExpertParallel(balance=EVEN, buffers={"scale": hyperep.Shard(0)}).apply(experts, mesh)
    with pytest.raises(ValueError, match="at one level"):
        hep.ExpertParallel(balance=EVEN, chunks=2)
    with pytest.raises(ValueError, match="exchange tokens"):
        hep.ExpertParallel(balance=EVEN, exchange="rows")


def test_refusals(two):
    two.run(_refused)
