# SPDX-License-Identifier: Apache-2.0
"""``fully_shard``: every gradient is the mean over all data ranks, in every arrangement."""

import copy

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

DIM, EXPERTS = 8, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.moe = hep.MoE(DIM, 12, EXPERTS, 2, num_shared_experts=1)

    def forward(self, x):
        x = x + self.linear(x)
        return x + self.moe(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _batch(rank, step=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, DIM, generator=generator, dtype=torch.float64).to(dtype)


def _loss(model, rank, step=0, dtype=torch.float64):
    return model(_batch(rank, step, dtype)).float().square().mean()


def _pair(platform, shape, names, dtype=torch.float64, chunks=1, **settings):
    """The model whole, and the same weights sharded."""
    torch.manual_seed(0)
    whole = Model().to(dtype)
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in sharded.layers:
        hep.ExpertParallel(chunks=chunks).apply(layer.moe.experts, mesh)
    assert hep.fully_shard(sharded, mesh, blocks="layers.*", **settings) is sharded
    return whole, sharded


def _largest_error(whole, sharded):
    """Over all parameters, of gradients, relative."""
    errors = {}
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor), name
        wanted, found = whole.get_parameter(name).grad, p.grad.full_tensor()
        errors[name] = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return max(errors.values()), errors


ARRANGEMENTS = {
    "ep 4": ((1, 4), ("efsdp", "ep"), {}),
    "nothing beside ep": ((4,), ("ep",), {}),
    "in chunks, beside what is shared": ((1, 4), ("efsdp", "ep"), {"chunks": 2}),
    "2 x 2": ((2, 2), ("efsdp", "ep"), {}),
    "ep 1": ((4, 1), ("efsdp", "ep"), {}),
    "other names and order": ((2, 2), ("experts", "data"), {}),
    "replicas": ((2, 1, 2), ("replicas", "efsdp", "ep"), {"replicate": ("replicas",)}),
    "replicas and shards": ((1, 2, 2), ("replicas", "efsdp", "ep"), {"replicate": ("replicas",)}),
    "two dimensions beside": ((2, 1, 2), ("dp", "cp", "ep"), {}),
    "kept after forward": ((2, 2), ("efsdp", "ep"), {"reshard_after_forward": False}),
    "given back after forward": ((2, 2), ("efsdp", "ep"), {"reshard_after_forward": True}),
    "offloaded": ((2, 2), ("efsdp", "ep"), {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}


def _means(platform, which, dtype):
    shape, names, settings = ARRANGEMENTS[which]
    if "experts" in names:  # any name will do for the style, if its mesh has one dimension
        torch.manual_seed(0)
        whole = Model().to(dtype)
        sharded = copy.deepcopy(whole)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in sharded.layers:
            hep.ExpertParallel().apply(layer.moe.experts, mesh["experts"])
        hep.fully_shard(sharded, mesh, blocks=["layers.0", "layers.1"], **settings)
    else:
        whole, sharded = _pair(platform, shape, names, dtype, **settings)
    ranks = platform.world_size
    (sum(_loss(whole, r, dtype=dtype) for r in range(ranks)) / ranks).backward()
    _loss(sharded, platform.rank, dtype=dtype).backward()
    return _largest_error(whole, sharded)


@pytest.mark.parametrize("which", ARRANGEMENTS)
@pytest.mark.composes(
    "FSDP2",
    "`fully_shard`: `ep` alone, with and without `efsdp` of one rank, `efsdp` x `ep`, `ep` of one rank, HSDP, further "
    "dimensions, both `reshard_after_forward`, parameters on the host: every gradient is the mean over all data ranks",
)
def test_a_local_mean_needs_no_sum_by_hand(four, which):
    for error, errors in four.run(_means, which, torch.float64):
        assert error < 1e-12, errors


@pytest.mark.parametrize("which", ["ep 4", "2 x 2"])
def test_divisors_do_not_depend_on_the_dtype(four, which):
    """PyTorch takes other ways for float32 than for float64, of which each divides at other places."""
    for error, errors in four.run(_means, which, torch.float32):
        assert error < 1e-4, errors


def _wrong_scale(platform):
    """As FSDP2 does it by itself: experts' gradients are ep times too large, and the test above would see it."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = Model().double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    everything = mesh._flatten()
    for layer in sharded.layers:
        hep.ExpertParallel().apply(layer.moe.experts, mesh["ep"])
        fully_shard(layer.moe.experts, mesh=mesh["efsdp"])
        fully_shard(layer, mesh=everything)
    fully_shard(sharded, mesh=everything)
    (sum(_loss(whole, r) for r in range(4)) / 4).backward()
    _loss(sharded, platform.rank).backward()
    _, errors = _largest_error(whole, sharded)
    experts = {name: error for name, error in errors.items() if ".moe.experts." in name}
    assert all(abs(error - 1) < 1e-9 for error in experts.values()), experts  # twice as large
    assert max(error for name, error in errors.items() if name not in experts) < 1e-12


def test_the_scale_that_fsdp2_chooses_is_seen_to_be_wrong(four):
    four.run(_wrong_scale)


NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "settings", "kept_out"),
    [((1, 2), {}, True), ((2, 1), {}, False), ((1, 2), {"mp_policy": NARROW}, False)],
    ids=["nobody has them too", "shared", "to be cast"],
)
def test_experts_that_nobody_shares_are_kept_out_of_fsdp2(two, shape, settings, kept_out):
    two.run(_kept_out, shape, settings, kept_out)


def _kept_out(platform, shape, settings, kept_out):
    _, sharded = _pair(platform, shape, ("efsdp", "ep"), torch.float32, **settings)
    for layer in sharded.layers:
        assert isinstance(layer, FSDPModule)
        assert isinstance(layer.moe.experts, FSDPModule) != kept_out


def _one_part_after_another(platform, shape, names, parts, policies):
    """Parts that are sharded by themselves are neither divided nor cast again where the whole is."""
    torch.manual_seed(0)
    whole = Model().double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in sharded.layers:
        hep.ExpertParallel().apply(layer.moe.experts, mesh)
    for path in parts:
        hep.fully_shard(sharded.get_submodule(path), mesh)
    hep.fully_shard(sharded, mesh, mp_policy=policies)
    hep.fully_shard(sharded, mesh)  # is there already
    (sum(_loss(whole, r) for r in range(2)) / 2).backward()
    _loss(sharded, platform.rank).backward()
    return _largest_error(whole, sharded)


@pytest.mark.parametrize(
    "parts", [["layers.0", "layers.1"], ["layers.0.moe.experts"], []], ids=["blocks", "experts", ""]
)
@pytest.mark.parametrize(
    ("shape", "names"), [((1, 2), ("efsdp", "ep")), ((2,), ("ep",)), ((2, 1), ("efsdp", "ep"))], ids=["1x2", "2", "2x1"]
)
def test_parts_one_after_another(two, shape, names, parts):
    for error, errors in two.run(_one_part_after_another, shape, names, parts, None):
        assert error < 1e-12, errors


def test_a_policy_that_comes_later_is_not_the_parts(two):
    """Parts keep the one that they were sharded with, as under FSDP2."""
    later = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    blocks = ["layers.0", "layers.1"]
    for error, errors in two.run(_one_part_after_another, (1, 2), ("efsdp", "ep"), blocks, later):
        assert error < 1e-12, errors


def _accumulated(platform, shape):
    whole, sharded = _pair(platform, shape, ("efsdp", "ep"))
    for step in range(3):
        (sum(_loss(whole, r, step) for r in range(4)) / 4).backward()
        sharded.set_requires_gradient_sync(step == 2)
        _loss(sharded, platform.rank, step).backward()
    return _largest_error(whole, sharded)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
@pytest.mark.composes("FSDP2", "gradient accumulation with `set_requires_gradient_sync`")
def test_gradient_accumulation(four, shape):
    for error, errors in four.run(_accumulated, shape):
        assert error < 1e-12, errors


def _narrow(platform):
    whole, sharded = _pair(platform, (2, 2), ("efsdp", "ep"), torch.float32, mp_policy=NARROW)
    # Where the router's rounding sends tokens elsewhere, nothing can be compared.
    for model in (whole, sharded):
        for layer in model.layers:
            layer.moe.router.register_forward_hook(lambda module, inputs, routing: _everywhere(routing))
    (sum(_loss(whole, r, dtype=torch.float32) for r in range(4)) / 4).backward()
    _loss(sharded, platform.rank, dtype=torch.float32).backward()
    assert {p.dtype for p in sharded.parameters()} == {p.grad.dtype for p in sharded.parameters()} == {torch.float32}
    return _largest_error(whole, sharded)


def _everywhere(routing):
    import dataclasses

    experts = torch.arange(routing.experts.numel()).reshape(routing.experts.shape) % EXPERTS
    return dataclasses.replace(routing, experts=experts, scores=routing.probabilities.gather(1, experts))


@pytest.mark.composes("FSDP2", "`MixedPrecisionPolicy`: bfloat16 parameters, gradients reduced in float32")
def test_mixed_precision(four):
    for _, errors in four.run(_narrow):
        assert max(errors.values()) < 0.05, errors
        assert max(errors.values()) > 1e-5


def _one_group(platform):
    """All parameters are DTensors, over two meshes, and one group of a fused or foreach optimizer takes them."""
    for options in ({"fused": True}, {"foreach": True}):
        whole, sharded = _pair(platform, (2, 2), ("efsdp", "ep"))
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, **options) for model in (whole, sharded)]
        for step in range(3):
            (sum(_loss(whole, r, step) for r in range(4)) / 4).backward()
            _loss(sharded, platform.rank, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for name, p in sharded.named_parameters():
            torch.testing.assert_close(p.full_tensor(), whole.get_parameter(name), rtol=1e-8, atol=1e-9)


@pytest.mark.composes("optimizers", "after `fully_shard` one group of fused or foreach AdamW takes all parameters")
def test_one_group_of_one_optimizer(four):
    four.run(_one_group)


def _few_experts(platform):
    """More ranks than experts are left on each: weights are cut within experts."""
    torch.manual_seed(0)
    whole = hep.MoE(DIM, 12, 2, 1, normalize=False).double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    hep.ExpertParallel().apply(sharded.experts, mesh)
    hep.fully_shard(sharded, mesh)
    assert sharded.experts.w1.placements == (Shard(1), Shard(0))
    (sum(whole(_batch(r)).square().mean() for r in range(4)) / 4).backward()
    sharded(_batch(platform.rank)).square().mean().backward()
    return _largest_error(whole, sharded)


@pytest.mark.composes("FSDP2", "fewer experts than ranks: cut within experts")
def test_experts_that_are_fewer_than_ranks(four):
    for error, errors in four.run(_few_experts):
        assert error < 1e-12, errors


def _refusals(platform):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    model = Model()
    for layer in model.layers:
        hep.ExpertParallel().apply(layer.moe.experts, mesh)
    cases = [
        (mesh["ep"], {"offload_policy": CPUOffloadPolicy()}, "no ranks are left to shard the experts"),
        (mesh, {"blocks": "layer.*"}, r"blocks='layer.\*' matches no part"),
        (mesh, {"replicate": ("dp",)}, "of which replicate="),
        (init_device_mesh("cpu", (2,)), {}, "needs a mesh with named dimensions"),
    ]
    for given, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            hep.fully_shard(model, given, **settings)
        assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_what_is_wrong_is_refused_before_anything_is_changed(two):
    two.run(_refusals)
