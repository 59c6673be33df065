# SPDX-License-Identifier: Apache-2.0
"""DTensors as inputs of sharded layers: outputs and all gradients are those of the plain layer on the whole tensor."""

import copy

import hyperep_torch as hep
import own_experts
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, parallel

import hyperep

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
DIM, EXPERTS = 8, 4

STYLES = {
    "ep": (hep.ExpertParallel, ("ep",), 1),
    "ep, rows": (lambda: hep.ExpertParallel(exchange="rows"), ("ep",), 1),
    "ep, chunks": (lambda: hep.ExpertParallel(chunks=2), ("ep",), 1),
    "ep, balanced": (lambda: hep.ExpertParallel(balance=hyperep.Balance()), ("ep",), 1),
    "levels": (lambda: hep.ExpertParallel(levels=("node", "ep")), ("node", "ep"), 2),
    "etp": (hep.ExpertTensorParallel, ("ep", "tp"), 1),
    "tp": (hep.TensorParallel, ("tp",), 0),
}
"""The style, the dimensions of its mesh, and over how many of them ranks have their own tokens."""


def _mesh(platform, dims):
    shape = (platform.world_size,) if len(dims) == 1 else (2, platform.world_size // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=dims)


def _draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _spread(whole, mesh, placements):
    """The DTensor, as a leaf."""
    made = distribute_tensor(whole, mesh, placements)
    return made.detach().requires_grad_() if whole.is_floating_point() else made


def _layers(style, mesh, **options):
    torch.manual_seed(0)
    plain = hep.MoE(DIM, 12, EXPERTS, 2, **options).double()
    layer = copy.deepcopy(plain)
    hep.parallelize_module(layer, mesh, {"experts": style})
    return plain, layer


def _same_gradients(layer, plain, mesh, levels):
    """Shards are whole together; what is plain has this rank's tokens, where ranks have their own."""
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        else:
            for dimension in range(levels):
                dist.all_reduce(grad, group=mesh.get_group(dimension))
        torch.testing.assert_close(grad, plain.get_parameter(name).grad, msg=lambda m, name=name: f"{name}: {m}")


def _layer(platform, which, shape, placements, options):
    style, dims, levels = STYLES[which]
    mesh = _mesh(platform, dims)
    plain, layer = _layers(style(), mesh, **options)
    whole, cotangent = _draw(*shape).requires_grad_(), _draw(*shape, seed=2)
    x = _spread(whole, mesh, placements)
    wanted = plain(whole)
    wanted.backward(cotangent)
    out = layer(x)
    assert isinstance(out, DTensor)
    assert (out.shape, list(out.placements), out.device_mesh) == (wanted.shape, placements, mesh)
    torch.testing.assert_close(out.full_tensor(), wanted)
    out.backward(distribute_tensor(cotangent, mesh, placements))
    assert list(x.grad.placements) == placements
    torch.testing.assert_close(x.grad.full_tensor(), whole.grad)
    _same_gradients(layer, plain, mesh, levels)


SHARED = {"num_shared_experts": 1}

LAYERS = [
    ("ep", (9, DIM), [S0], {}),
    ("ep", (4, 6, DIM), [S0], SHARED),
    ("ep", (4, 6, DIM), [S1], SHARED),
    ("ep", (3, 5, DIM), [S0], {}),
    ("ep", (3, 5, DIM), [S1], {}),
    ("ep", (2, 3, 4, DIM), [S2], {}),
    ("ep", (8, DIM), [R], {}),
    ("ep", (4, 6, DIM), [R], SHARED),
    ("ep", (3, 5, DIM), [R], SHARED),
    ("ep", (3, DIM), [R], {}),  # of four ranks one has none
    ("ep", (1, DIM), [R], {}),
    ("ep", (DIM,), [R], {}),
    ("ep, rows", (3, 5, DIM), [R], {}),
    ("ep, chunks", (3, 5, DIM), [R], SHARED),
    ("ep, chunks", (4, 6, DIM), [S1], SHARED),
    ("ep, balanced", (3, 5, DIM), [R], {}),
    ("tp", (3, 5, DIM), [R], SHARED),
]

GRIDS = [
    ("levels", (4, 6, DIM), [S0, S1], {}),
    ("levels", (3, 5, DIM), [S1, S1], {}),
    ("levels", (3, 5, DIM), [R, R], {}),
    ("levels", (4, 2, DIM), [R, R], SHARED),
    ("etp", (4, 6, DIM), [S0, R], SHARED),
    ("etp", (3, 5, DIM), [S1, R], {}),
    ("etp", (3, 5, DIM), [R, R], SHARED),
]


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize(("which", "shape", "placements", "options"), LAYERS)
def test_a_layer(request, ranks, which, shape, placements, options):
    request.getfixturevalue(ranks).run(_layer, which, shape, placements, options)


@pytest.mark.parametrize(("which", "shape", "placements", "options"), GRIDS)
def test_a_layer_over_a_grid(four, which, shape, placements, options):
    four.run(_layer, which, shape, placements, options)


def _own(platform, kind, call, placement, exchange):
    """Experts of every sort alone, called with rows that are sorted as a whole, or with tokens."""
    mesh = _mesh(platform, ("ep",))
    if kind == "GroupedExperts":
        torch.manual_seed(0)
        plain = hep.GroupedExperts(own_experts.DIM, 12, own_experts.EXPERTS).double()
        experts = copy.deepcopy(plain)
    else:
        plain, experts = own_experts.made(kind)
    hep.ExpertParallel(exchange=exchange).apply(experts, mesh)
    inputs, cotangent = own_experts.data(call, 0)
    known = {}
    if call == "tokens":
        inputs[1][::2, 0] = own_experts.EXPERTS  # nobody
        known = {"rows": int((inputs[1] < own_experts.EXPERTS).sum())} if kind == "GroupedExperts" else {}
    ours = [_spread(x.detach(), mesh, [R if call == "rows" and n else placement]) for n, x in enumerate(inputs)]
    wanted = plain(*inputs)
    wanted.backward(cotangent)
    out = experts(*ours, **known)
    assert list(out.placements) == [placement]
    torch.testing.assert_close(out.full_tensor(), wanted)
    out.backward(distribute_tensor(cotangent, mesh, [placement]))
    for x, whole in zip(ours, inputs, strict=True):
        if whole.requires_grad:
            torch.testing.assert_close(x.grad.full_tensor(), whole.grad)
    _same_gradients(experts, plain, mesh, 1)


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("placement", [S0, R])
@pytest.mark.parametrize(("call", "exchange"), [("rows", "rows"), ("tokens", "tokens"), ("tokens", "rows")])
@pytest.mark.parametrize("kind", ["GroupedExperts", "[E, out, in], packed"])
def test_experts_alone(request, ranks, kind, call, placement, exchange):
    request.getfixturevalue(ranks).run(_own, kind, call, placement, exchange)


def _plain_beside(platform):
    """Plain tensors beside DTensors lie as these do: this rank's counts, and all tokens' weights, of which a part."""
    mesh = _mesh(platform, ("ep",))
    torch.manual_seed(0)
    plain = hep.GroupedExperts(own_experts.DIM, 12, own_experts.EXPERTS).double()
    experts = hep.ExpertParallel().apply(copy.deepcopy(plain), mesh)
    (rows, counts), _ = own_experts.data("rows", 0)
    counts = torch.tensor([2, 0, 1, 1]) if platform.rank else torch.tensor([0, 3, 1, 0])
    local = rows.detach()[4 * platform.rank : 4 * platform.rank + 4].clone()
    out = experts(DTensor.from_local(local, mesh, [S0], run_check=False), counts)
    torch.testing.assert_close(out.to_local(), plain(local, counts))
    (tokens, indices, weights), cotangent = own_experts.data("tokens", 0)
    ours = [tokens.detach().requires_grad_(), weights.detach().requires_grad_()]
    replicated = DTensor.from_local(ours[0], mesh, [R], run_check=False)
    wanted, out = plain(tokens, indices, weights), experts(replicated, indices, ours[1])
    wanted.backward(cotangent)
    torch.testing.assert_close(out.to_local(), wanted)
    out.to_local().backward(cotangent)
    for x, whole in zip(ours, (tokens, weights), strict=True):
        torch.testing.assert_close(x.grad, whole.grad)
    _same_gradients(experts, plain, mesh, 1)


def test_plain_tensors_beside_them(two):
    two.run(_plain_beside)


def _mask_and_statistics(platform, shape, placement, distributed):
    mesh = _mesh(platform, ("ep",))
    plain, layer = _layers(hep.ExpertParallel(), mesh)
    whole, mask = _draw(*shape), _draw(*shape[:-1], seed=3) > -0.5
    wanted, stats = plain(whole, mask=mask, with_stats=True)
    beside = distribute_tensor(mask, mesh, [placement]) if distributed else mask
    out, ours = copy.deepcopy(layer)(_spread(whole, mesh, [placement]), mask=beside, with_stats=True)
    torch.testing.assert_close(out.full_tensor(), wanted)
    counts = ours.tokens_per_expert.clone()
    dist.all_reduce(counts)
    assert counts.tolist() == stats.tokens_per_expert.tolist()
    if shape[0] % platform.world_size == 0:
        assert ours.sequences == stats.sequences // platform.world_size


@pytest.mark.parametrize(
    ("shape", "placement", "distributed"),
    [((4, 6, DIM), R, True), ((4, 6, DIM), S0, True), ((3, 5, DIM), R, True), ((3, 5, DIM), R, False)],
)
def test_a_mask_and_statistics(two, shape, placement, distributed):
    two.run(_mask_and_statistics, shape, placement, distributed)


def _after_sequence_parallel(platform):
    """What PyTorch's own style gives, by default: a DTensor that is sharded in the sequence."""
    mesh = _mesh(platform, ("tp",))
    plain, layer = _layers(hep.ExpertParallel(), mesh)
    norm = nn.LayerNorm(DIM).double()
    plain, block = nn.Sequential(norm, plain), nn.Sequential(copy.deepcopy(norm), layer)
    parallel.parallelize_module(block[0], mesh, parallel.SequenceParallel())
    whole = _draw(2, 8, DIM)
    part = whole.chunk(platform.world_size, dim=1)[platform.rank]
    wanted, out = plain(whole), block(part)
    assert list(out.placements) == [S1]
    torch.testing.assert_close(out.full_tensor(), wanted)
    wanted.square().sum().backward()
    out.full_tensor().square().sum().backward()
    _same_gradients(layer, plain[1], mesh, 1)
    with torch.inference_mode():
        torch.testing.assert_close(block(part).full_tensor(), wanted)


@pytest.mark.composes("tensor parallelism", "layers of experts after PyTorch's `SequenceParallel`, on its DTensors")
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_after_sequence_parallel(request, ranks):
    request.getfixturevalue(ranks).run(_after_sequence_parallel)


def _linear(platform, bias, packed, output):
    """``ColwiseParallel`` gives what ``RowwiseParallel`` takes, as DTensors, which know what they are."""
    mesh = _mesh(platform, ("tp",))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=bias)).double()
    ours = copy.deepcopy(plain)
    styles = {"0": hep.ColwiseParallel(packed=packed), "1": hep.RowwiseParallel(output_layout=output)}
    hep.parallelize_module(ours, mesh, styles)
    whole, cotangent = _draw(3, 5, 8).requires_grad_(), _draw(3, 5, 8, seed=2)
    x = _spread(whole, mesh, [R])
    first, wanted = plain[0](whole), plain(whole)
    features = ours[0](x)
    torch.testing.assert_close(features.full_tensor(), first)
    if packed == 1:
        assert list(features.placements) == [S2]
    else:
        features = features.redistribute(placements=[R])
    out = ours[1](features.relu() if packed == 1 else features)
    wanted = plain[1](first.relu()) if packed == 1 else wanted
    assert list(out.placements) == [Partial() if output else R]
    torch.testing.assert_close(out.full_tensor(), wanted)
    wanted.backward(cotangent)
    out.redistribute(placements=[R]).backward(distribute_tensor(cotangent, mesh, [R]))
    torch.testing.assert_close(x.grad.full_tensor(), whole.grad)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.get_parameter(name).grad)


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize(
    ("bias", "packed", "output"), [(True, 1, None), (False, 1, hyperep.Partial()), (True, 2, None)]
)
def test_linear_modules(request, ranks, bias, packed, output):
    request.getfixturevalue(ranks).run(_linear, bias, packed, output)


def _refused(platform, which, shape, placements, message):
    """On all ranks, after which the layer works."""
    style, dims, _ = STYLES[which]
    mesh = _mesh(platform, dims)
    _, layer = _layers(style(), mesh)
    x = DTensor.from_local(_draw(*shape), mesh, placements, run_check=False)
    with pytest.raises(ValueError, match=message):
        layer(x)
    replicated = DTensor.from_local(_draw(*shape), mesh, [R] * mesh.ndim, run_check=False)
    assert layer(replicated).shape == shape


REFUSED = [
    (
        "ep",
        [S1],
        r"ExpertParallel: .* lies as \[Shard\(dim=1\)\] .* over 'ep' sharded .*, or replicated; .*to_local",
    ),
    ("ep", [Partial()], r"lies as \[Partial\(sum\)\]"),
    ("levels", [R, S0], r"over 'node', 'ep' sharded in .*, or replicated"),
    ("levels", [S0, S1], r"ExpertParallel: the tokens are a DTensor"),
    ("etp", [S0, S0], r"over 'ep' sharded in .* and over 'tp' replicated"),
    ("tp", [S0], r"TensorParallel: .* over 'tp' replicated; redistribute it so"),
]


@pytest.mark.parametrize(("which", "placements", "message"), REFUSED)
def test_other_layouts_are_refused(four, which, placements, message):
    four.run(_refused, which, (8, DIM), placements, message)


def _other_calls(platform):
    mesh, other = _mesh(platform, ("ep",)), _mesh(platform, ("node", "ep"))
    plain, layer = _layers(hep.ExpertParallel(), mesh)
    x = distribute_tensor(_draw(8, DIM), mesh, [S0])
    indices, counts = torch.zeros(8, 2, dtype=torch.int64), torch.tensor([8, 0, 0, 0])
    weights = torch.ones(8, 2, dtype=torch.float64)
    spread = lambda t, p: distribute_tensor(t, mesh, [p])  # noqa: E731
    refused = {
        "must lie over DeviceMesh": lambda: layer(distribute_tensor(_draw(8, DIM), other, [S0, R])),
        "its experts are under no style of hyperep_torch": lambda: plain(x),
        r"tokens_per_expert lies as \[Shard": lambda: layer.experts(x, spread(counts, S0)),
        r"beside the tokens lies as \[Replicate": lambda: layer.experts(x, spread(indices, R), spread(weights, S0)),
        "were called with plain tokens": lambda: layer.experts(_draw(8, DIM), spread(indices, R), spread(weights, R)),
        "must be those of all tokens": lambda: layer.experts(spread(_draw(8, DIM), R), indices[:2], weights[:2]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    _, layer = _layers(hep.ExpertParallel(), mesh, **SHARED)
    shared = {"shared_experts.w[13]": hep.ColwiseParallel(), "shared_experts.w2": hep.RowwiseParallel()}
    parallel_mesh = hep.parallelize_module(layer, init_device_mesh("cpu", (platform.world_size,)), shared)
    with pytest.raises(ValueError, match=r"shared_experts.w1.weight is sharded over ranks that each have their own"):
        parallel_mesh(x)


def test_other_calls_are_refused(four):
    four.run(_other_calls)


def _linear_refused(platform):
    mesh = _mesh(platform, ("tp",))
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).double()
    hep.parallelize_module(layers, mesh, {"0": hep.ColwiseParallel(), "1": hep.RowwiseParallel()})
    for part, shape, placement in ((0, (4, 8), S0), (0, (4, 8), S1), (0, (4, 8), Partial()), (1, (4, 16), S0)):
        with pytest.raises(ValueError, match=r"must lie over DeviceMesh.*, (or )?replicated; redistribute it"):
            layers[part](DTensor.from_local(_draw(*shape), mesh, [placement], run_check=False))


def test_linear_modules_refuse_sharded_tokens(two):
    two.run(_linear_refused)
