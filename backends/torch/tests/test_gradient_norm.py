# SPDX-License-Identifier: Apache-2.0
"""One norm over gradients of any meshes, and one decision to skip a step."""

import copy
import math

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

SHAPE = (8, 6)


def _parameter(whole, gradient, mesh=None, placements=()):
    parameter = nn.Parameter(whole if mesh is None else distribute_tensor(whole, mesh, placements))
    if gradient is not None:
        parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, placements)
    return parameter


def _mixture(platform):
    """Parameters of many layouts, and the whole gradients; the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    layouts = [
        (None, ()),
        (mesh["b"], [Shard(0)]),
        (mesh["a"], [Shard(1)]),
        (mesh, [Shard(0), Shard(0)]),
        (mesh, [Replicate(), Shard(1)]),
        (mesh, [Shard(0), Replicate()]),
        (mesh, [Replicate(), Replicate()]),
        (mesh["a", "b"]._flatten(), [Shard(0)]),
        (None, ()),
    ]
    gradients = [torch.randn(SHAPE, generator=generator) for _ in layouts]
    # On a sub-mesh each line of ranks holds a tensor of its own; here they all are one tensor.
    parameters = [
        _parameter(torch.zeros(SHAPE), g.clone(), *layout) for g, layout in zip(gradients, layouts, strict=True)
    ]
    # A pending sum: each rank's term, of which the sum over four ranks is the gradient.
    gradients.append(torch.randn(SHAPE, generator=generator))
    pending = _parameter(torch.zeros(SHAPE), None, mesh, [Replicate(), Replicate()])
    pending.grad = DTensor.from_local(gradients[-1] / 4, mesh, [Partial(), Partial()], run_check=False)
    # And one without a gradient, and one that is uneven: rank 3 of four has nothing of it.
    parameters += [pending, _parameter(torch.zeros(SHAPE), None, mesh, [Shard(0), Shard(0)])]
    gradients.append(torch.randn((3, 2), generator=generator))
    parameters.append(_parameter(torch.zeros(3, 2), gradients[-1].clone(), layouts[-2][0], [Shard(0)]))
    return parameters, gradients


def _whole(parameters):
    grads = [p.grad for p in parameters if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def _clip(platform, norm_type, foreach):
    parameters, gradients = _mixture(platform)
    reference = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(reference, gradients, strict=True):
        p.grad = g.clone()
    wanted = torch.nn.utils.clip_grad_norm_(reference, 0.5, norm_type)
    found = hep.clip_grad_norm_(iter(parameters), 0.5, norm_type, foreach=foreach)
    assert type(found) is torch.Tensor
    assert found.shape == ()
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(_whole(parameters), reference, strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    before = _whole(parameters)
    assert hep.clip_grad_norm_(parameters, 1e6, norm_type) < 1  # what is short enough stays
    for ours, theirs in zip(_whole(parameters), before, strict=True):
        assert torch.equal(ours, theirs)
    return found.item()


@pytest.mark.parametrize(
    ("norm_type", "foreach"), [(2.0, None), (2, False), (1.0, True), (3.0, None), (math.inf, None)]
)
@pytest.mark.composes(
    "gradient norms",
    "`hyperep_torch.clip_grad_norm_` over plain tensors and DTensors of any meshes",
)
def test_it_is_pytorchs_over_any_mixture(four, norm_type, foreach):
    assert len(set(four.run(_clip, norm_type, foreach))) == 1


def test_alone():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    assert hep.clip_grad_norm_(parameter, 1.0) == 0.0
    parameter.grad = torch.tensor([3.0, 4.0])
    assert hep.clip_grad_norm_(parameter, 1.0) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def _not_finite(platform):
    mesh = init_device_mesh("cpu", (4,))
    local = torch.full((2,), math.inf if platform.rank == 2 else 1.0)
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
    parameter.grad = DTensor.from_local(local, mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="gradients of 2 parameters is inf, so they cannot be clipped"):
        hep.clip_grad_norm_([parameter, nn.Parameter(torch.zeros(1))], 1.0, error_if_nonfinite=True)
    assert hep.clip_grad_norm_([parameter], 1.0).isinf()


def test_what_is_not_finite_is_told_on_every_rank(four):
    four.run(_not_finite)


def _stages(platform):
    """Ranks that hold other parameters, as the stages of a pipeline do."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([3.0 + platform.rank])
    return hep.clip_grad_norm_([parameter], 1.0, group=torch.distributed.group.WORLD).item()


def test_other_ranks_parameters_count(two):
    assert two.run(_stages) == [5.0, 5.0]


# ---------------------------------------------------------------------------------------------------- GradScaler
def _scaled(platform, sharded, bad_rank):
    """A layer's step with a gradient that is infinite in one rank's expert only."""
    torch.manual_seed(0)
    layer = hep.MoE(8, 12, 4, 2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    hep.ExpertParallel().apply(layer.experts, mesh)
    if sharded:
        hep.fully_shard(layer, mesh)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    scaler = hep.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    before = copy.deepcopy({name: p.detach().clone() for name, p in layer.named_parameters()})
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(platform.rank))
    scaler.scale(layer(x).square().mean()).backward()
    scaled = layer.experts.w1.grad.to_local().clone()
    if platform.rank == bad_rank:
        layer.experts.w2.grad.to_local()[0, 0, 0] = math.inf
    scaler.unscale_(optimizer)
    if bad_rank is None:
        torch.testing.assert_close(layer.experts.w1.grad.to_local(), scaled / 1024)
    norm = hep.clip_grad_norm_(layer.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    moved = [
        not torch.equal(p.to_local() if isinstance(p, DTensor) else p, b.to_local() if isinstance(b, DTensor) else b)
        for p, b in ((p, before[name]) for name, p in layer.named_parameters())
    ]
    return any(moved), all(moved), scaler.get_scale(), norm.item()


def _two_optimizers(platform):
    torch.manual_seed(0)
    layer = hep.MoE(8, 12, 4, 2)
    hep.ExpertParallel().apply(layer.experts, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, foreach=False) for m in (layer.experts, layer.router)]
    scaler = hep.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in (layer.experts.w1, *layer.router.parameters())]
    scaler.scale(layer(torch.randn(6, 8)).square().mean()).backward()
    if platform.rank == 1:
        layer.experts.w2.grad.to_local()[0, 0, 0] = math.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    after = [p.detach() for p in (layer.experts.w1, *layer.router.parameters())]
    same = [
        torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in pair))
        for pair in zip(before, after, strict=True)
    ]
    return same, scaler.get_scale()


@pytest.mark.composes("`GradScaler`", "with several optimizers it skips, as PyTorch's, the step of that one alone")
def test_several_optimizers_are_skipped_one_by_one(two):
    for (experts, router), scale in two.run(_two_optimizers):
        assert (experts, router, scale) == (True, False, 512.0)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain router", "everything sharded"])
@pytest.mark.composes(
    "`GradScaler`",
    "`hyperep_torch.GradScaler`: what is not finite on one rank skips the step on all",
)
def test_an_infinity_in_one_ranks_expert_skips_the_step_everywhere(two, sharded):
    for some, every, scale, norm in two.run(_scaled, sharded, None):
        assert some
        assert every
        assert (scale, math.isfinite(norm)) == (1024.0, True)
    for bad in range(2):
        for some, _, scale, _ in two.run(_scaled, sharded, bad):
            assert not some
            assert scale == 512.0
