# SPDX-License-Identifier: Apache-2.0
"""Opening several DTensors at once means what ``to_local`` means for each, in their values and gradients."""

import pytest
import torch
from hyperep_torch import local_parts as module_under_test
from hyperep_torch import swiglu
from hyperep_torch.local_parts import local_parts
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import hyperep
from hyperep.distribute import distribute_parameter
from hyperep.moe import GroupedExperts
from hyperep.placements import Partial, Replicate, Shard


@pytest.fixture
def mesh(platform):
    return hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))


def _parameters(platform, mesh, layouts, dtype=torch.float32):
    torch.manual_seed(0)
    return [
        hyperep.distribute_tensor(torch.randn(4, 6, 2, dtype=dtype), mesh, layout).detach().requires_grad_()
        for layout in layouts
    ]


def _gradients(parameters, open_all, function, **options):
    return torch.autograd.grad(function(*open_all(parameters)), parameters, **options)


def _one_by_one(parameters):
    return tuple(parameter.to_local() for parameter in parameters)


FUNCTIONS = {
    "all used": lambda a, b: (a * b.sin()).sum(),
    "one unused": lambda a, b: a.cos().sum(),
    "expanded gradient": lambda a, b: a.sum() + (a * b).sum(),
    "transposed gradient": lambda a, b: (a.transpose(0, 2) * torch.arange(48.0).reshape(2, 6, 4)).sum() + b.sum(),
}
LAYOUTS = ([Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Replicate()], [Shard(0), Partial()])


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_gradients_are_those_of_to_local(platform, mesh, layout, function):
    parameters = _parameters(platform, mesh, [layout, [Shard(0), Shard(2)]])
    found = _gradients(parameters, local_parts, function, allow_unused=True)
    wanted = _gradients(parameters, _one_by_one, function, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert isinstance(ours, DTensor)
        assert (ours.placements, ours.shape) == (theirs.placements, theirs.shape)
        if Partial() not in layout:
            assert ours.stride() == ours.to_local().stride() == (12, 2, 1)  # as the parameter has them
        assert ours.device_mesh is theirs.device_mesh
        assert torch.equal(ours.to_local(), theirs.to_local())
        assert torch.equal(ours + 1.0, theirs + 1.0)  # PyTorch can go on computing with it


def test_gradients_are_made_without_from_local_where_their_layout_is_known(platform, mesh, monkeypatch):
    parameters = _parameters(platform, mesh, LAYOUTS[:2])
    monkeypatch.setattr(module_under_test, "DTensor", None)  # its constructor, or its from_local, would fail
    with pytest.raises(TypeError, match="NoneType"):
        _gradients(parameters, local_parts, FUNCTIONS["all used"])
    made = []
    monkeypatch.setattr(module_under_test, "DTensor", lambda *a, **k: made.append(a) or DTensor(*a, **k))
    _gradients(parameters, local_parts, FUNCTIONS["all used"])
    assert len(made) == 2


def test_a_gradient_says_its_own_dtype(platform, mesh):
    """Under FSDP2's mixed precision a parameter's layout keeps the dtype that it has between steps."""
    narrow = [
        DTensor(p.to_local().detach().to(torch.bfloat16), p._spec, requires_grad=True)
        for p in _parameters(platform, mesh, LAYOUTS[:2])
    ]
    for gradient in _gradients(narrow, local_parts, FUNCTIONS["all used"]):
        assert gradient._spec.tensor_meta.dtype == gradient.to_local().dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [(), ("w1",), ("w1", "w3"), ("w1", "w2", "w3")])
def test_frozen_weights_cost_no_gradients(platform, mesh, frozen, monkeypatch):
    experts = GroupedExperts(platform, dim=8, hidden_dim=8, num_experts=4)
    hyperep.ExpertTensorParallel().apply(experts, mesh)
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    products = []
    right = swiglu.columns_product
    monkeypatch.setattr(swiglu, "columns_product", lambda *a: products.append(a) or right(*a))
    x = torch.randn(6, 8, requires_grad=True)
    experts(x, torch.tensor([1, 2, 3, 0])).sum().backward()
    assert len(products) == 3 - len(frozen)
    assert {name for name, p in experts.named_parameters() if p.grad is None} == set(frozen)


def test_the_compiler_sees_what_it_knows(platform, mesh):
    parameters = _parameters(platform, mesh, LAYOUTS[:2])
    function = torch.compile(lambda ps: sum(part.sum() for part in local_parts(ps)), backend="eager", fullgraph=True)
    wanted = sum(part.sum() for part in local_parts(parameters))
    torch.testing.assert_close(function(parameters), wanted)


def _uneven_gradient(platform):
    """On two ranks, of three rows: of a contiguous gradient and of an expanded one."""
    native = init_device_mesh("cpu", (2,))
    whole = torch.arange(12.0).reshape(3, 4)
    parameters = [dtensor.distribute_tensor(whole, native, [dtensor.Shard(0)]).requires_grad_() for _ in range(2)]
    first, second = _gradients(parameters, local_parts, lambda a, b: (a * a).sum() + b.sum())
    (third, _) = _gradients(parameters, local_parts, lambda a, b: (a * a).sum() + b.sum(), create_graph=True)
    return [gradient.full_tensor().tolist() for gradient in (first, second, third)]


def test_parts_of_different_sizes(two):
    for first, second, third in two.run(_uneven_gradient):
        assert first == third == (2 * torch.arange(12.0).reshape(3, 4)).tolist()
        assert second == [[1.0] * 4] * 3


def test_gradients_can_be_differentiated(platform, mesh):
    parameters = _parameters(platform, mesh, LAYOUTS[:2], torch.float64)

    def curvature(open_all):
        first = _gradients(parameters, open_all, lambda a, b: (a.sin() * b * b).sum(), create_graph=True)
        return torch.autograd.grad(sum((g.to_local() ** 2).sum() for g in first), parameters)

    for ours, theirs in zip(curvature(local_parts), curvature(_one_by_one), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())


def test_one_step_of_backward_serves_all(platform, mesh):
    parts = local_parts(_parameters(platform, mesh, LAYOUTS[:3]))
    assert len({part.grad_fn for part in parts}) == 1
    assert local_parts(()) == ()


def test_parts_are_views_that_leave_the_parameter_alone(platform, mesh):
    (parameter,) = _parameters(platform, mesh, LAYOUTS[:1])
    (part,) = local_parts([parameter])
    assert part.untyped_storage().data_ptr() == parameter.to_local().untyped_storage().data_ptr()
    assert parameter._local_tensor.grad_fn is None
    assert parameter.is_leaf


def test_a_gradient_does_not_share_the_layout_of_its_parameter(platform, mesh):
    parameters = _parameters(platform, mesh, LAYOUTS[:1])
    (gradient,) = _gradients(parameters, local_parts, lambda a: (a * a).sum())
    whole = gradient.redistribute(placements=[dtensor.Replicate(), dtensor.Replicate()])
    gradient._spec.placements = whole.placements
    assert parameters[0].placements == (dtensor.Shard(0), dtensor.Shard(1))


def test_a_module_opens_tied_parameters_and_those_of_functional_call(platform, mesh):
    def forward(m, x):
        return x * m.one.sum() + (m.two * m.two).sum()

    module = platform.make_module("Tied", {"one": torch.ones(4, 2), "two": torch.ones(4, 2)}, forward)
    for name in ("one", "two"):
        distribute_parameter(module, name, mesh, [Shard(0), Replicate()])
    module.two = module.one
    module(torch.ones(())).backward()
    assert module.one.grad.to_local().tolist() == [[1.0 + 2.0] * 2] * 4
    threes = {n: (p.detach() * 0 + 3).requires_grad_() for n, p in module.named_parameters(remove_duplicate=False)}
    assert torch.func.functional_call(module, threes, (torch.ones(()),), tie_weights=False).item() == 24.0 + 72.0
