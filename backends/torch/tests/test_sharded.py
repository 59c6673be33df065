# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters are DTensors that PyTorch's own tools understand; between real gloo processes."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hyperep_torch.sharded import from_native_placement, to_native_placement
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh as NativeMesh
from torch.distributed.device_mesh import init_device_mesh as init_native_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import hyperep
from hyperep.distribute import distribute_parameter
from hyperep.moe import GroupedExperts, MoE
from hyperep.placements import Partial, Replicate, Shard
from hyperep.sharding import Sharding, gather_tensor

DIM, HIDDEN, EXPERTS = 8, 12, 4


def _relative(a, b):
    a, b = (t.full_tensor() if isinstance(t, DTensor) else t for t in (a.detach(), b.detach()))
    return ((a - b).abs().max() / b.abs().max()).item()


# --------------------------------------------------------------------------------------------------- one rank
@pytest.mark.parametrize("placement", [Shard(2), Replicate(), Partial("sum"), Partial("max")], ids=repr)
def test_placements_convert_both_ways(placement):
    assert from_native_placement(to_native_placement(placement)) == placement


def test_a_placement_without_counterpart_is_refused():
    strange = dtensor.Partial("product")
    with pytest.raises(ValueError, match=r"product"):
        from_native_placement(strange)

    class StridedShard(dtensor.Shard):
        """As FSDP2 makes them."""

    with pytest.raises(ValueError, match="has no counterpart in hyperep"):
        from_native_placement(StridedShard(0))


def test_a_rank_that_is_alone_can_shard(platform):
    mesh = hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    whole = experts.w1.detach().clone()
    hyperep.ExpertTensorParallel().apply(experts, mesh)
    assert isinstance(experts.w1, DTensor)
    assert platform.sharding(experts.w1).mesh == mesh
    assert torch.equal(experts.w1.full_tensor(), whole)


# ------------------------------------------------------------------------------------------------- four ranks
def _layouts(platform):
    mesh = hyperep.init_device_mesh(platform, (2, 2), ("ep", "tp"))
    whole = torch.arange(4 * 6 * 2.0).reshape(4, 6, 2)
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(2)], [Shard(0), Shard(0)], [Shard(1), Replicate()]):
        for target in (mesh, hyperep.init_device_mesh(platform, (2, 2))):  # the second one without names
            tensor = hyperep.distribute_tensor(whole, target, placements)
            assert isinstance(tensor, DTensor)
            assert tensor.shape == whole.shape
            assert tensor.stride() == whole.stride()
            assert torch.equal(tensor.full_tensor(), whole)
            assert torch.equal(tensor.to_local(), whole[Sharding(target, placements).local_slices(whole.shape)])
            # The way PyTorch itself would lay it out.
            native = dtensor.distribute_tensor(whole, tensor.device_mesh, list(map(to_native_placement, placements)))
            assert torch.equal(native.to_local(), tensor.to_local())
            assert platform.sharding(tensor) == Sharding(target, placements)
    for line in (mesh["ep"], mesh["tp"]):
        tensor = hyperep.distribute_tensor(whole, line, [Shard(0)])
        assert tensor.device_mesh.mesh.tolist() == line.ranks.tolist()
        assert dist.get_process_group_ranks(tensor.device_mesh.get_group()) == line.ranks.tolist()
        # On a sub-mesh the first rank of each line decides; all ranks hold the same here.
        assert torch.equal(tensor.full_tensor(), whole)


def test_every_layout_is_the_one_of_pytorch(four):
    four.run(_layouts)


def _adopted(platform):
    native = init_native_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    mesh = platform.adopt_mesh(native)
    assert platform.adopt_mesh(native) is mesh
    assert platform.adopt_mesh(object()) is None
    assert mesh.native is native
    assert mesh.mesh_dim_names == ("dp", "ep")
    assert mesh.ranks.tolist() == native.mesh.tolist()
    assert mesh.get_coordinate() == tuple(native.get_coordinate())
    for name in ("dp", "ep"):
        assert mesh.get_group(name) is native.get_group(name)
        assert mesh[name].get_group() is native[name].get_group()
    line = mesh["ep"]
    assert line.native == native["ep"]
    tensor = platform.from_local(torch.full((1, 2), float(platform.rank)), Sharding(line, (Shard(0),)))
    assert tensor.device_mesh is line.native
    assert platform.sharding(tensor).mesh == line
    first = platform.rank - platform.rank % 2
    assert tensor.full_tensor().tolist() == [[first, first], [first + 1, first + 1]]


def test_a_native_mesh_is_adopted_with_its_groups(four):
    four.run(_adopted)


def _without_names(platform):
    """Two styles on native meshes whose dimensions have no names; nothing is sliced natively, which is slow."""
    made = []
    slicing = NativeMesh.__getitem__
    NativeMesh.__getitem__ = lambda mesh, names: made.append(names) or slicing(mesh, names)
    try:
        outputs = []
        for style, shape in ((hyperep.ExpertParallel(), (4,)), (hyperep.ExpertTensorParallel(), (2, 2))):
            layer = _layer(platform)
            style.apply(layer.experts, platform.adopt_mesh(init_native_mesh("cpu", shape)))
            outputs.append(layer(_tokens(0)))
    finally:
        NativeMesh.__getitem__ = slicing
    assert _relative(*outputs) < 1e-5
    assert not made


def test_native_meshes_without_names_serve_every_style(four):
    four.run(_without_names)


def _equal_meshes(platform):
    """A native mesh that equals one made for the core is still the user's own, and used as such."""
    core = hyperep.init_device_mesh(platform, (2, 2), ("dp", "ep"))
    made = hyperep.distribute_tensor(torch.ones(4, 2), core, [Replicate(), Shard(0)])
    native = init_native_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    assert made.device_mesh == native
    assert made.device_mesh is not native
    tensor = hyperep.distribute_tensor(torch.ones(4, 2), platform.adopt_mesh(native), [Replicate(), Shard(0)])
    assert tensor.device_mesh is native
    assert platform.sharding(tensor) == platform.sharding(made)


def test_equal_meshes_are_kept_apart(four):
    four.run(_equal_meshes)


def _wrong_device(platform):
    from types import SimpleNamespace

    from hyperep_torch.sharded import Meshes

    native = init_native_mesh("cpu", (4,))
    meshes = Meshes(platform, SimpleNamespace(kind=SimpleNamespace(type="cuda")))
    with pytest.raises(ValueError, match="is one of 'cpu' devices, but the platform is on 'cuda'"):
        meshes.adopt(native)


def test_a_mesh_of_another_device_is_refused(four):
    four.run(_wrong_device)


def _gradients(platform):
    mesh = hyperep.init_device_mesh(platform, (4,), ("ep",))
    weight = torch.arange(12.0).reshape(4, 3) + 1
    module = platform.make_module("M", {"w": weight, "unused": torch.ones(4)}, lambda m, x: x @ m.w.t())
    for name in ("w", "unused"):
        distribute_parameter(module, name, mesh, [Shard(0)])
    x = torch.full((2, 3), platform.rank + 1.0)
    _, pullback = platform.vjp(module, x, parameters=[module.w, module.unused])
    grad_x, grad_w, grad_unused = pullback(torch.ones(()).expand(2, 1))
    assert type(grad_w) is type(grad_unused) is torch.Tensor
    assert torch.equal(grad_x, weight[platform.rank].expand(2, 3))
    assert torch.equal(grad_w, 2 * x[:1])
    assert torch.equal(grad_unused, torch.zeros(1))
    platform.assign(module.w, torch.full((1, 3), float(platform.rank)))
    assert module.w.full_tensor()[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_gradients_of_dtensors_are_local_and_never_absent(four):
    four.run(_gradients)


def _tokens(rank, rows=10):
    rng = np.random.default_rng(rank)
    return torch.from_numpy(rng.normal(size=(rows, DIM)).astype(np.float32))


def _layer(platform):
    return MoE(platform, DIM, HIDDEN, EXPERTS, 2, seed=5)


def _training(platform, folder):
    """Expert-parallel training with PyTorch's own optimizer, clipping and checkpoint, against one rank's."""
    mesh = hyperep.init_device_mesh(platform, (4,), ("ep",))
    reference, layer = _layer(platform), _layer(platform)
    keys = list(layer.state_dict())
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    assert list(layer.state_dict()) == keys
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (layer, reference))
    assert [type(p) is torch.nn.Parameter for p in layer.router.parameters()] == [True]

    def step():
        loss = layer(_tokens(platform.rank)).square().sum()
        loss.backward()
        for p in layer.router.parameters():
            p.grad = platform.all_reduce(p.grad)
        reference(torch.cat([_tokens(r) for r in range(4)])).square().sum().backward()
        for name, p in layer.named_parameters():
            assert _relative(p.grad, reference.get_parameter(name).grad) < 1e-5, name
        experts, whole = (torch.nn.utils.clip_grad_norm_(m.experts.parameters(), 0.5) for m in (layer, reference))
        assert abs(experts.full_tensor() / whole - 1) < 1e-5
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    # Adam divides by the root of tiny second moments, which spreads rounding errors.
    for name, p in layer.named_parameters():
        assert _relative(p, reference.get_parameter(name)) < 1e-4, name
    dcp.save({"model": layer.state_dict(), "optim": get_optimizer_state_dict(layer, ours)}, checkpoint_id=folder)
    # Loaded at another degree: two ranks share the experts, twice.
    other = MoE(platform, DIM, HIDDEN, EXPERTS, 2, seed=6)
    hyperep.ExpertParallel().apply(other.experts, hyperep.init_device_mesh(platform, (2, 2), ("dp", "ep"))["ep"])
    assert other.experts.w1.to_local().shape[0] == 2
    resumed = torch.optim.AdamW(other.parameters(), lr=0.05)
    state = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, resumed, state["optim"])
    for name, p in other.named_parameters():
        saved = layer.get_parameter(name)
        moments = [(resumed.state[p][key], ours.state[saved][key]) for key in ("exp_avg", "exp_avg_sq", "step")]
        for one, two in ((p, saved), *moments):
            assert two.abs().sum() > 0, name
            assert torch.equal(*(t.full_tensor() if isinstance(t, DTensor) else t for t in (one, two))), name


@pytest.mark.composes("DCP", "weights and optimizer, saved and loaded")
def test_optimizer_clipping_and_distributed_checkpoint(four, tmp_path):
    four.run(_training, str(tmp_path))


def _copied(platform):
    mesh = hyperep.init_device_mesh(platform, (4,), ("ep",))
    layer = _layer(platform)
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.experts.w2.to_local().zero_()
    x = _tokens(platform.rank)
    assert not twin(x).any()
    assert layer(x).abs().sum() > 1
    assert platform.sharding(twin.experts.w2) == platform.sharding(layer.experts.w2)


def test_a_deep_copy_of_a_sharded_module_uses_its_own_weights(four):
    four.run(_copied)


def _checkpointed(platform):
    mesh = hyperep.init_device_mesh(platform, (4,), ("ep",))
    layer = _layer(platform)
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        # A rank without any token of its own takes part all the same.
        x = _tokens(platform.rank, rows=0 if platform.rank == 2 else 10).requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for plain, recomputed in zip(*results, strict=True):
        plain, recomputed = (g.to_local() if isinstance(g, DTensor) else g for g in (plain, recomputed))
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_around_expert_parallelism(four):
    four.run(_checkpointed)


def _fsdp(platform, shard_first):
    """FSDP2 over dp and expert parallelism over ep on one native mesh, against the unsharded layer."""
    native = init_native_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    platform.adopt_mesh(native)
    reference, layer = _layer(platform), _layer(platform)
    hyperep.ExpertParallel().apply(layer.experts, native["ep"])
    calls = []
    if not shard_first:
        platform.wrap_forward(layer, lambda inner, x: calls.append(1) or inner(x))
    for module in (layer.experts, layer):
        fully_shard(module, mesh=native["dp"])
    if shard_first:
        platform.wrap_forward(layer, lambda inner, x: calls.append(1) or inner(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    y = layer(_tokens(platform.rank))
    assert calls == [1]
    everything = reference(torch.cat([_tokens(r) for r in range(4)]))
    assert _relative(y, everything.split(10)[platform.rank]) < 1e-5
    y.square().sum().backward()
    everything.square().sum().backward()
    for name in ("w1", "w2", "w3"):
        parameter, expected = layer.experts.get_parameter(name), reference.experts.get_parameter(name).grad
        assert parameter.device_mesh.mesh_dim_names == ("dp", "ep")
        assert _relative(2 * parameter.grad, expected) < 1e-5  # FSDP2 takes the mean over dp
    gate = 2 * layer.router.gate.grad.full_tensor()  # and over ep nobody has summed yet
    gate = platform.all_reduce(gate, platform.adopt_mesh(native["ep"]).get_group())
    assert _relative(gate, reference.router.gate.grad) < 1e-5
    before = layer.experts.w1.full_tensor().clone()
    optimizer.step()
    assert not torch.equal(layer.experts.w1.full_tensor(), before)
    with pytest.raises(ValueError, match="no counterpart"):
        platform.sharding(layer.experts.w1)


@pytest.mark.parametrize("shard_first", [False, True], ids=["wrap, then shard", "shard, then wrap"])
@pytest.mark.composes("FSDP2", "PyTorch's own `fully_shard` over `dp`, before and after the style")
def test_fsdp2_on_a_two_dimensional_mesh(four, shard_first):
    four.run(_fsdp, shard_first)


def _gathered(platform):
    mesh = hyperep.init_device_mesh(platform, (2, 2), ("ep", "tp"))
    whole = torch.arange(16.0).reshape(4, 4)
    sharding = Sharding(mesh, (Shard(1), Shard(1)))
    tensor = hyperep.distribute_tensor(whole, mesh, sharding.placements)
    assert torch.equal(gather_tensor(tensor.to_local(), sharding), tensor.full_tensor())


def test_the_core_gathers_what_pytorch_gathers(four):
    four.run(_gathered)


def _no_such_parameter(platform):
    mesh = hyperep.init_device_mesh(platform, (4,), ("ep",))
    module = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Linear has no parameter 'weights' of its own; it has \['bias', 'weight'\]"):
        platform.shard_parameter(module, "weights", torch.ones(1, 4), Sharding(mesh, (Shard(0),)))
    module.weight.requires_grad_(False)
    distribute_parameter(module, "weight", mesh, [Shard(0)])
    assert isinstance(module.weight, DTensor)
    assert not module.weight.requires_grad
    # The shard owns its memory: it does not keep the whole parameter alive.
    assert module.weight.to_local().untyped_storage().nbytes() == 4 * 4


def test_shard_parameter_replaces_what_is_there_only(four):
    four.run(_no_such_parameter)
