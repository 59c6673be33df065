# SPDX-License-Identifier: Apache-2.0
"""Native modules around neutral forwards, and wrapped forwards of any module, under PyTorch's own tools."""

import copy
import gc
import pickle
import weakref

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.func import functional_call

import hyperep


def _linear(platform, name="Linear"):
    def forward(m, x, *, scale=1.0):
        return (x @ m.weight + m.offset) * scale

    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return platform.make_module(
        name, {"weight": weight}, forward, buffers={"offset": torch.tensor([0.5, -0.5])}, description="2 -> 2"
    )


def _tree(platform):
    def forward(m, x):
        return m.second(m.first(x), scale=2.0) + m.bias

    children = {"first": _linear(platform), "second": _linear(platform)}
    return platform.make_module("Tree", {"bias": torch.zeros(2)}, forward, children=children)


X = torch.tensor([[1.0, -1.0]])


def test_a_module_computes_and_is_an_ordinary_one(platform):
    tree = _tree(platform)
    assert tree(X).tolist() == [[2 * (-1.5 * 1 + -2.5 * 3 + 0.5), 2 * (-1.5 * 2 + -2.5 * 4 - 0.5)]]
    assert isinstance(tree, nn.Module)
    assert sorted(tree.state_dict()) == ["bias", "first.offset", "first.weight", "second.offset", "second.weight"]
    assert "(first): Linear(2 -> 2)" in repr(tree)
    assert list(platform.parameters(tree)) == ["bias", "first.weight", "second.weight"]
    assert list(platform.buffers(tree)) == ["first.offset", "second.offset"]
    assert list(platform.named_modules(tree)) == ["", "first", "second"]
    assert platform.named_modules(tree)["first"] is tree.first


def test_buffers_get_no_gradient_and_parameters_do(platform):
    tree = _tree(platform)
    tree(X).sum().backward()
    assert all(p.grad is not None for p in tree.parameters())
    assert not tree.first.offset.requires_grad


def test_modules_made_of_one_tensor_do_not_share_it(platform):
    weight = torch.ones(2)
    one, other = (platform.make_module("M", {"w": weight}, lambda m: m.w) for _ in range(2))
    platform.assign(one.w, torch.zeros(2))
    assert other.w.tolist() == weight.tolist() == [1.0, 1.0]


def test_children_are_found_when_called(platform):
    tree = _tree(platform)
    tree.first = nn.Identity()
    assert torch.equal(tree(X), tree.second(X, scale=2.0))


def test_functional_call_sees_its_own_weights(platform):
    tree = _tree(platform)
    zeros = {name: torch.zeros_like(p) for name, p in tree.named_parameters()}
    assert functional_call(tree, zeros, (X,)).tolist() == [[1.0, -1.0]]
    assert functional_call(tree, {**zeros, "bias": torch.ones(2)}, (X,)).tolist() == [[2.0, 0.0]]


def test_assign_writes_in_place_outside_autodiff(platform):
    module = _linear(platform)
    weight = module.weight
    platform.assign(weight, torch.full((2, 2), 7.0))
    assert module.weight is weight
    assert weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert weight.is_leaf
    with pytest.raises(ValueError, match=r"shape \(2,\) for a part of \(2, 2\)"):
        platform.assign(weight, torch.zeros(2))


def test_what_is_no_module_is_refused(platform):
    with pytest.raises(TypeError, match=r"builtins.dict is no torch.nn.Module"):
        platform.parameters({})


# ------------------------------------------------------------------------------------------------- wrap_forward
class _UserModule(nn.Module):
    """As a user would write it: with a bound helper, a keyword and two outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, x, *, scale=1.0):
        return self.linear(x) * scale, self.training


def _times(factor, log=None):
    def wrapper(inner, *inputs, **kwargs):
        if log is not None:
            log.append(factor)
        y, training = inner(*inputs, **kwargs)
        return y * factor, training

    return wrapper


def test_wrappers_nest_and_keywords_pass(platform):
    module = _UserModule()
    expected = module(X, scale=3.0)[0]
    log = []
    platform.wrap_forward(module, _times(2, log))
    platform.wrap_forward(module, _times(5, log))
    assert torch.equal(module(X, scale=3.0)[0], expected * 2 * 5)
    assert log == [5, 2]  # the last one is outermost


def test_a_wrapped_module_stays_what_it_was(platform):
    module, other = _UserModule(), _UserModule()
    keys = list(module.state_dict())
    platform.wrap_forward(module, _times(2))
    assert isinstance(module, _UserModule)
    assert type(module).__name__ == "_UserModule"
    assert list(module.state_dict()) == keys
    assert type(other) is _UserModule
    assert torch.equal(other(X)[0], other.linear(X))
    module.eval()
    assert module(X)[1] is False


def test_a_deep_copy_runs_on_its_own_weights_and_keeps_its_own_wrappers(platform):
    module = _UserModule()
    platform.wrap_forward(module, _times(2))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.linear.weight.zero_()
    platform.wrap_forward(twin, _times(3))
    assert twin(X)[0].tolist() == [[0.0, 0.0]]
    assert torch.equal(module(X)[0], 2 * module.linear(X))


def test_wrappers_may_hold_the_platform_when_copied(platform):
    class Wrapper:
        def __init__(self):
            self.platform = platform

        def __call__(self, inner, *inputs):
            return inner(*inputs)

    module = _linear(platform)
    platform.wrap_forward(module, Wrapper())
    (wrapper,) = copy.deepcopy(module)._forward_wrappers
    assert wrapper.function.platform is platform


def test_a_styled_module_is_freed_without_the_collector_of_cycles(platform):
    layer = hep.MoE(8, 16, 4, 2)
    hep.ExpertParallel(chunks=2).apply(layer.experts, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    layer(torch.randn(5, 8)).sum().backward()
    gone = [weakref.ref(part) for part in layer.modules()]
    gc.collect()
    gc.disable()
    try:
        del layer
        assert [of() for of in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_a_styled_module_is_not_pickled_and_a_plain_one_is(platform):
    layer, x = hep.MoE(8, 16, 4, 2), torch.randn(5, 8)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    hep.ExpertParallel().apply(layer.experts, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    with pytest.raises(TypeError, match=r"cannot be pickled, .* save its state dict .* apply the style after loading"):
        pickle.dumps(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_functional_call_and_hooks_see_the_wrapped_forward(platform):
    module = _UserModule()
    platform.wrap_forward(module, _times(2))
    seen = []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    module.register_forward_hook(lambda m, args, output: seen.append(output[0]))
    weights = {"linear.weight": torch.eye(2)}
    y, _ = functional_call(module, weights, (X,), {"scale": 3.0})
    assert torch.equal(y, 6 * X)
    assert seen[0] == {"scale": 3.0}
    assert torch.equal(seen[1], 6 * X)


def test_a_forward_set_on_the_instance_is_wrapped_too(platform):
    module = _UserModule()
    module.forward = lambda x: (x + 1, True)
    platform.wrap_forward(module, _times(2))
    assert module(X)[0].tolist() == [[4.0, 0.0]]


def test_one_class_serves_many_instances(platform):
    modules = [_UserModule() for _ in range(2)]
    for factor, module in enumerate(modules, start=2):
        platform.wrap_forward(module, _times(factor))
    assert type(modules[0]) is type(modules[1])
    assert torch.equal(modules[0](X)[0], 2 * modules[0].linear(X))
    assert torch.equal(modules[1](X)[0], 3 * modules[1].linear(X))
