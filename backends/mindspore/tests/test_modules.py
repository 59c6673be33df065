# SPDX-License-Identifier: Apache-2.0
"""Native cells: names, wrappers, copies, optimizers, checkpoints, and layouts on parameters."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import hyperep
from hyperep.moe import MoEConfig, RouterConfig, build_moe
from hyperep.sharding import Sharding


def _linear(platform, seed=0):
    weight = platform.from_host(np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32))
    shift = platform.from_host(np.ones(2, np.float32))

    def forward(m, x, *, scale=1.0):
        return platform.xp.matmul(x, platform.xp.permute_dims(m.weight, (1, 0))) * scale + m.shift

    return platform.make_module("Linear", {"weight": weight}, forward, buffers={"shift": shift}, description="3 -> 2")


def _pair(platform):
    children = {"first": _linear(platform, 1), "second": _linear(platform, 2)}
    return platform.make_module("Pair", {}, lambda m, x: m.first(x) + m.second(x, scale=2.0), children=children)


def _x():
    return Tensor(np.random.default_rng(9).normal(size=(4, 3)).astype(np.float32))


def test_a_neutral_module_is_a_cell_with_named_parameters(platform):
    pair = _pair(platform)
    assert isinstance(pair, nn.Cell)
    assert list(platform.parameters(pair)) == ["first.weight", "second.weight"]
    assert list(platform.buffers(pair)) == ["first.shift", "second.shift"]
    assert [p.name for p in pair.trainable_params()] == ["first.weight", "second.weight"]
    assert [p.name for p in platform.buffers(pair).values()] == ["first.shift", "second.shift"]
    assert list(platform.named_modules(pair)) == ["", "first", "second"]
    assert "Linear(3 -> 2)" in str(pair).replace("\n", "").replace("  ", "")


def test_gradients_reach_the_parameters_and_not_the_buffers(platform):
    pair, x = _pair(platform), _x()
    parameters = platform.parameters(pair)
    _outputs, pullback = platform.vjp(pair, x, parameters=list(parameters.values()))
    cotangent = np.random.default_rng(4).normal(size=(4, 2)).astype(np.float32)
    gradients = dict(zip(["x", *parameters], pullback(Tensor(cotangent)), strict=True))
    np.testing.assert_allclose(gradients["first.weight"].asnumpy(), cotangent.T @ x.asnumpy(), rtol=1e-5)
    np.testing.assert_allclose(gradients["second.weight"].asnumpy(), 2 * cotangent.T @ x.asnumpy(), rtol=1e-5)


def _layers(platform):
    """Every layer that has parameters of its own, as made, copied, and sharded."""
    router = RouterConfig(num_experts=4, top_k=2)
    layer = build_moe(platform, MoEConfig(dim=3, hidden_dim=5, router=router, num_shared_experts=1))
    twin = copy.deepcopy(layer)
    sharded = copy.deepcopy(twin)
    mesh = hyperep.init_device_mesh(platform, (1,), ("tp",))
    plan = {"experts": hyperep.TensorParallel(), "shared_*.w[13]": hyperep.ColwiseParallel()}
    hyperep.parallelize_module(sharded, mesh, plan)
    summed = platform.make_module("M", {"w": platform.xp.ones((2, 3))}, lambda m, x: platform.xp.sum(m.w) + x)
    return {"pair": _pair(platform), "moe": layer, "copied": twin, "sharded": sharded, "summed": summed}


def test_every_layer_hands_out_contiguous_gradients(platform):
    """An in-place collective changes nothing in a view, and says nothing."""
    for name, layer in _layers(platform).items():
        parameters = layer.trainable_params()
        for _ in range(2):
            step = ms.value_and_grad(lambda x, layer=layer: ops.sum(layer(x) ** 2), None, parameters)
            for parameter, gradient in zip(parameters, step(_x())[1], strict=True):
                assert gradient.is_contiguous(), (name, parameter.name)
        _outputs, pullback = platform.vjp(layer, _x(), parameters=parameters)
        assert all(gradient.is_contiguous() for gradient in pullback(ops.ones(_outputs.shape))), name


def test_two_modules_of_the_same_tensors_are_apart(platform):
    weight = platform.xp.ones((2,))
    one, other = (platform.make_module("M", {"w": weight}, lambda m: m.w + 0) for _ in range(2))
    platform.assign(platform.parameters(one)["w"], platform.xp.zeros((2,)))
    assert other().asnumpy().tolist() == [1, 1]
    assert weight.asnumpy().tolist() == [1, 1]


def test_assign_is_in_place_and_checks_the_shape(platform):
    linear = _linear(platform)
    parameter = platform.parameters(linear)["weight"]
    platform.assign(parameter, platform.xp.ones((2, 3)))
    assert platform.parameters(linear)["weight"] is parameter
    assert platform.to_host(platform.local(parameter))[0].tolist() == [[1] * 3] * 2
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for a part of \(2, 3\)"):
        platform.assign(parameter, platform.xp.ones((3, 2)))


class Native(nn.Cell):
    """A cell of a user, with an argument that has a default."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(3, 2, has_bias=False)

    def construct(self, x, scale=1.0):
        return self.dense(x) * scale


def test_wrappers_nest_around_the_construct_of_any_cell(platform):
    cell, x = Native(), _x()
    plain = cell(x, scale=3.0).asnumpy()
    platform.wrap_forward(cell, lambda inner, x, **kwargs: inner(x * 2, **kwargs))
    platform.wrap_forward(cell, lambda inner, x, **kwargs: inner(x, **kwargs) + 1)
    assert isinstance(cell, Native)
    assert type(cell).__name__ == "Native"
    np.testing.assert_allclose(cell(x, scale=3.0).asnumpy(), 2 * plain + 1, rtol=1e-5)
    assert list(platform.parameters(cell)) == ["dense.weight"]
    _outputs, pullback = platform.vjp(cell, x, parameters=list(platform.parameters(cell).values()))
    weight_gradient = pullback(ops.ones((4, 2)))[1]
    np.testing.assert_allclose(weight_gradient.asnumpy(), np.ones((2, 4)) @ (2 * x.asnumpy()), rtol=1e-5)


def test_a_wrapper_belongs_to_its_cell_and_goes_along_with_a_copy(platform):
    cell, other, x = Native(), Native(), _x()
    before = other(x).asnumpy()
    platform.wrap_forward(cell, lambda inner, x: inner(x) + 1)
    np.testing.assert_array_equal(other(x).asnumpy(), before)
    twin = copy.deepcopy(cell)
    platform.assign(platform.parameters(twin)["dense.weight"], platform.xp.zeros((2, 3)))
    np.testing.assert_array_equal(twin(x).asnumpy(), np.ones((4, 2)))
    assert cell(x).asnumpy().ravel()[0] != 1


def test_a_construct_set_on_the_instance_stays_innermost(platform):
    cell, x = Native(), _x()
    cell.construct = lambda x: x * 5
    platform.wrap_forward(cell, lambda inner, x: inner(x) + 1)
    np.testing.assert_allclose(cell(x).asnumpy(), x.asnumpy() * 5 + 1, rtol=1e-6)


def _sharded(platform):
    linear = _linear(platform)
    mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
    sharding = Sharding(mesh, (hyperep.Shard(0),))
    platform.shard_parameter(linear, "weight", platform.xp.full((1, 3), 2.0), sharding)
    return linear, sharding


def test_the_layout_is_on_the_parameter(platform):
    pair = _pair(platform)
    linear, sharding = _sharded(platform)
    pair.first = linear
    parameter = platform.parameters(pair)["first.weight"]
    assert isinstance(parameter, ms.Parameter)
    assert parameter.name == "first.weight"
    assert tuple(parameter.shape) == (1, 3)
    assert platform.sharding(parameter) == sharding
    assert platform.sharding(platform.parameters(pair)["second.weight"]) is None
    twin = platform.parameters(copy.deepcopy(pair))["first.weight"]
    assert platform.sharding(twin) == sharding
    assert twin is not parameter


def test_a_sharded_parameter_trains_and_is_saved(platform, tmp_path):
    linear, sharding = _sharded(platform)
    optimizer = nn.SGD(linear.trainable_params(), learning_rate=0.5)
    _, gradients = ms.value_and_grad(lambda x: ops.sum(linear(x)), None, optimizer.parameters)(_x())
    optimizer(gradients)
    # The sum runs over the two columns that the shift makes of one.
    expected = 2 - 0.5 * 2 * _x().asnumpy().sum(0, keepdims=True)
    np.testing.assert_allclose(linear.weight.asnumpy(), expected, rtol=1e-5)
    ms.save_checkpoint(linear, str(tmp_path / "linear.ckpt"))
    platform.assign(linear.weight, platform.xp.zeros((1, 3)))
    ms.load_param_into_net(linear, ms.load_checkpoint(str(tmp_path / "linear.ckpt")))
    np.testing.assert_allclose(linear.weight.asnumpy(), expected, rtol=1e-5)
    assert platform.sharding(linear.weight) == sharding


def test_only_a_parameter_of_its_own_can_be_sharded(platform):
    pair = _pair(platform)
    mesh = hyperep.init_device_mesh(platform, (1,), ("ep",))
    with pytest.raises(
        ValueError, match=r"NeutralCell has no parameter 'scale' of its own; it has \['shift', 'weight'\]"
    ):
        platform.shard_parameter(pair.first, "scale", platform.xp.ones((2,)), Sharding(mesh, (hyperep.Replicate(),)))
