# SPDX-License-Identifier: Apache-2.0
"""Styles on modules whose parameters are DTensors already, as ``DTensor.from_local`` makes them."""

import hyperep_torch as hep
import own_experts
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import hyperep

LAYOUTS = {
    "ep": (hep.ExpertParallel, ("ep",), {name: [Shard(0)] for name in ("w1", "w2", "w3")}),
    "etp": (
        hep.ExpertTensorParallel,
        ("ep", "tp"),
        {"w1": [Shard(0), Shard(1)], "w2": [Shard(0), Shard(2)], "w3": [Shard(0), Shard(1)]},
    ),
}


def _mesh(platform, dims):
    shape = (platform.world_size,) if len(dims) == 1 else (2, platform.world_size // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=dims)


def _cut(tensor, mesh, placements):
    """This rank's part, without communication; of a copy, so that nothing else is held."""
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            tensor = tensor.chunk(mesh.size(dimension), placement.dim)[mesh.get_local_rank(dimension)]
    return tensor.detach().clone()


def _from_local(module, mesh, layout):
    """Put DTensors of this rank's parts in the place of parameters of *module*; returns them."""
    made = {}
    for name, placements in layout.items():
        part = _cut(module.get_parameter(name), mesh, placements)
        made[name] = nn.Parameter(DTensor.from_local(part, mesh, placements, run_check=False))
        setattr(module, name, made[name])
    return made


def _trains_as_the_plain_layer(platform, which, ready):
    style, dims, layout = LAYOUTS[which]
    mesh = _mesh(platform, dims)
    torch.manual_seed(0)
    plain = hep.MoE(8, 12, 4, 2).double()
    layer = hep.MoE(8, 12, 4, 2).double()
    layer.load_state_dict(plain.state_dict())
    made = _from_local(layer.experts, mesh, {name: layout[name] for name in ready})
    memory = {name: p.to_local().data_ptr() for name, p in made.items()}
    hep.parallelize_module(layer, mesh, {"experts": style()})
    for name, parameter in made.items():
        assert layer.experts.get_parameter(name) is parameter
        assert parameter.to_local().data_ptr() == memory[name]
    data = [torch.randn(5 + r, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    ep = mesh["ep"]
    here = data[ep.get_local_rank()]
    torch.testing.assert_close(layer(here), plain(here))
    layer(here).square().sum().backward()
    for x in data[: ep.size()]:
        plain(x).square().sum().backward()
    for name, parameter in layer.experts.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.experts.get_parameter(name).grad)


@pytest.mark.parametrize("ready", [("w1", "w2", "w3"), ("w2",)])
@pytest.mark.parametrize(("which", "fixture"), [("ep", "two"), ("ep", "four"), ("etp", "four")])
def test_parameters_made_by_from_local_are_taken(request, which, fixture, ready):
    request.getfixturevalue(fixture).run(_trains_as_the_plain_layer, which, ready)


def _own_experts(platform, style):
    """A forward of somebody's own sees this rank's parts, of parameters and of a buffer, as plain tensors."""
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ranks",))
    plain, module = own_experts.made("numbers and buffers")
    _from_local(module, mesh, {name: [Shard(0)] for name, _ in list(module.named_parameters())})
    module.shift = DTensor.from_local(_cut(module.shift, mesh, [Shard(0)]), mesh, [Shard(0)], run_check=False)
    before = dict(module.named_parameters())
    {"hyperep": hyperep, "hyperep_torch": hep}[style].ExpertParallel().apply(module, hyperep_mesh(mesh))
    assert all(module.get_parameter(name) is p for name, p in before.items())
    results, weights, after = own_experts.trained(plain, "rows", range(platform.world_size))
    ours, our_weights, ours_after = own_experts.trained(module, "rows", [platform.rank])
    own_experts.agree(ours[0], results[platform.rank], "outputs")
    own_experts.agree(our_weights, weights, "weights' gradients")
    own_experts.agree(ours_after, after, "after three steps")


def _buffer(platform):
    mesh = _mesh(platform, ("ep",))
    _, module = own_experts.made("numbers and buffers")
    module.shift = DTensor.from_local(module.shift, mesh, [Replicate()], run_check=False)
    with pytest.raises(ValueError, match=r"buffer .shift. is distributed already, as \[Replicate.* not as \[Shard"):
        hep.ExpertParallel(buffers={"shift": hyperep.Shard(0)}).apply(module, mesh)
    assert not isinstance(module.scale, DTensor)


def test_a_buffer_that_lies_otherwise_is_refused(two):
    two.run(_buffer)


def hyperep_mesh(native):
    """The core's style asks for the name."""
    adopted = hyperep.platform.selection.adopt_mesh(native)
    return hyperep.DeviceMesh(adopted.platform, adopted.ranks, ("ep",), [adopted.get_group()], native)


@pytest.mark.parametrize("style", ["hyperep", "hyperep_torch"])
def test_own_experts_made_by_from_local(two, style):
    two.run(_own_experts, style)


def _on_meta(platform):
    mesh = _mesh(platform, ("ep",))
    local = hep.MoE(8, 12, 4 // platform.world_size, 2, device="meta").experts  # knows its own experts alone
    layer = hep.MoE(8, 12, 4, 2, device="meta")
    for name, part in list(local.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False)))
    hep.ExpertParallel().apply(layer.experts, mesh)
    assert layer.experts.w1.shape == (4, 12, 8)
    assert layer.experts.w1.is_meta
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    hep.init_weights(layer)
    plain = hep.MoE(8, 12, 4, 2)
    plain.load_state_dict({n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in layer.state_dict().items()})
    x = torch.randn(5 + platform.rank, 8, generator=torch.Generator().manual_seed(platform.rank))
    torch.testing.assert_close(layer(x), plain(x))


def test_parameters_on_meta(two):
    two.run(_on_meta)


def _linear(platform):
    mesh = _mesh(platform, ("tp",))
    torch.manual_seed(0)
    plain, sliced = (nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).double() for _ in range(2))
    sliced.load_state_dict(plain.state_dict())
    made = _from_local(sliced[0], mesh, {"weight": [Shard(0)], "bias": [Shard(0)]})
    made |= _from_local(sliced[1], mesh, {"weight": [Shard(1)], "bias": [Replicate()]})
    hep.parallelize_module(sliced, mesh, {"0": hep.ColwiseParallel(), "1": hep.RowwiseParallel()})
    assert sliced[1].bias is made["bias"]
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in (plain, sliced):
        module(x).square().sum().backward()
    torch.testing.assert_close(sliced(x), plain(x))
    for name, parameter in sliced.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.get_parameter(name).grad)


def test_linear_modules_made_by_from_local(two):
    two.run(_linear)


def _fsdp(platform):
    """FSDP2's shards lie over the same ranks in the same way, and are none of a style."""
    mesh = _mesh(platform, ("ep",))
    layer = hep.MoE(8, 12, 4, 2)
    fully_shard(layer.experts, mesh=mesh)
    with pytest.raises(ValueError, match="distributed already, by FSDP2; apply styles first"):
        hep.ExpertParallel().apply(layer.experts, mesh)


def test_shards_of_fsdp2_are_refused(two):
    two.run(_fsdp)
