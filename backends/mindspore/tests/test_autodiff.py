# SPDX-License-Identifier: Apache-2.0
"""``custom_vjp`` and ``vjp``: the order of pullbacks, what is freed, what raises, and what is never absent."""

import gc
import weakref

import mindspore as ms
import numpy as np
import pytest
from hyperep_mindspore import private_names
from mindspore import Parameter, Tensor, ops


def _tensor(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _scaled(platform, factor, calls=None):
    """Multiplication by *factor*, whose backward says so."""

    def backward(residuals, cotangents, needed):
        if calls is not None:
            calls.append(factor)
        return (cotangents[0] * factor,)

    return platform.custom_vjp(lambda x: (x * factor, ()), backward)


def _value(tensor):
    return tensor.asnumpy().ravel()[0]


def test_pullbacks_in_any_order_give_their_own_gradients(platform):
    x, one = _tensor(2), ops.ones((2,))
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        pullbacks = [platform.vjp(_scaled(platform, factor), x)[1] for factor in (2.0, 3.0, 5.0)]
        gradients = {i: pullbacks[i](one) for i in order}
        assert [_value(gradients[i][0]) for i in range(3)] == [2.0, 3.0, 5.0], order


def test_the_youngest_pullback_does_not_evaluate_again(platform):
    calls = []

    def function(x):
        calls.append(1)
        return x * 2

    _, first = platform.vjp(function, _tensor(2))
    _, second = platform.vjp(function, _tensor(2))
    second(ops.ones((2,)))
    first(ops.ones((2,)))
    assert len(calls) == 2


def test_an_abandoned_pullback_does_not_disturb_the_next_one(platform):
    x, one = _tensor(2), ops.ones((2,))
    _, kept = platform.vjp(_scaled(platform, 2.0), x)
    platform.vjp(_scaled(platform, 3.0), x)
    assert _value(kept(one)[0]) == 2.0
    _, after = platform.vjp(_scaled(platform, 5.0), x)
    assert _value(after(one)[0]) == 5.0


def test_residuals_die_with_their_graph(platform):
    def watched(x):
        residual = x * 7
        seen.append(weakref.ref(residual))
        return x * 1, (residual,)

    seen = []
    function = platform.custom_vjp(watched, lambda residuals, cotangents, needed: (cotangents[0] + residuals[0],))
    x, one = _tensor(2), ops.ones((2,))
    outputs, pullback = platform.vjp(lambda x: function(x) * 2, x)
    pullback(one)
    del outputs, pullback
    gc.collect()
    assert seen[0]() is None
    platform.vjp(lambda x: function(x) * 2, x)  # abandoned
    gc.collect()
    platform.vjp(lambda x: x * 2, x)
    gc.collect()
    assert seen[1]() is None


def test_an_error_in_the_function_ends_the_recording(platform):
    def broken(x):
        _scaled(platform, 2.0)(x)
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        platform.vjp(broken, _tensor(2))
    assert not private_names.is_recording()
    _outputs, pullback = platform.vjp(_scaled(platform, 3.0), _tensor(2))
    assert _value(pullback(ops.ones((2,)))[0]) == 3.0


def test_an_error_in_a_backward_arrives_and_ends_there(platform):
    def broken(residuals, cotangents, needed):
        raise KeyError("in backward")

    _, pullback = platform.vjp(platform.custom_vjp(lambda x: (x * 1, ()), broken), _tensor(2))
    with pytest.raises(KeyError, match="in backward"):
        pullback(ops.ones((2,)))
    _, pullback = platform.vjp(_scaled(platform, 3.0), _tensor(2))
    assert _value(pullback(ops.ones((2,)))[0]) == 3.0


def test_gradients_are_never_absent(platform):
    used, unused = Parameter(_tensor(2, 2), name="w"), Parameter(_tensor(3), name="w")
    frozen = Parameter(_tensor(2), name="f", requires_grad=False)
    counts = Tensor([1, 2], ms.int64)
    x, y = _tensor(4, 2), _tensor(4)
    _outputs, pullback = platform.vjp(
        lambda x, y, counts: (ops.matmul(x, used), counts + 1), x, y, counts, parameters=[unused, frozen, used]
    )
    gradients = pullback(ops.ones((4, 2)), ops.zeros((2,), ms.int64))
    assert [tuple(g.shape) for g in gradients] == [(4, 2), (4,), (2,), (3,), (2,), (2, 2)]
    assert not any(g.asnumpy().any() for g in gradients[1:5])
    np.testing.assert_allclose(gradients[5].asnumpy(), x.asnumpy().T @ np.ones((4, 2)), rtol=1e-5)


def test_parameters_alone_and_constants(platform):
    w = Parameter(_tensor(3), name="w")
    _, pullback = platform.vjp(lambda: ops.sum(w * w), parameters=[w])
    (gradient,) = pullback(Tensor(1.0, ms.float32))
    np.testing.assert_allclose(gradient.asnumpy(), 2 * w.asnumpy(), rtol=1e-6)
    _, pullback = platform.vjp(lambda x: ops.ones((2,)), _tensor(3))
    assert not pullback(ops.ones((2,)))[0].asnumpy().any()


def test_the_same_tensor_twice_is_two_inputs(platform):
    x = _tensor(2)
    _, pullback = platform.vjp(lambda a, b: 2 * a + 3 * b, x, x)
    assert [_value(g) for g in pullback(ops.ones((2,)))] == [2.0, 3.0]


def test_the_number_of_cotangents_is_checked(platform):
    _, pullback = platform.vjp(lambda x: (x, x * 2), _tensor(2))
    with pytest.raises(ValueError, match="1 cotangents for 2 outputs"):
        pullback(ops.ones((2,)))


def test_nothing_inside_a_custom_forward_is_recorded(platform):
    w = Parameter(_tensor(2), name="w")
    function = platform.custom_vjp(lambda x: (x * w, ()), lambda residuals, cotangents, needed: (cotangents[0] * 11,))
    _, pullback = platform.vjp(function, _tensor(2), parameters=[w])
    gradients = pullback(ops.ones((2,)))
    assert [_value(g) for g in gradients] == [11.0, 0.0]


def test_cotangents_may_be_strided_and_outputs_unused(platform):
    seen = []

    def backward(residuals, cotangents, needed):
        seen.append([c.asnumpy().tolist() for c in cotangents])
        return (cotangents[0] * 1 + cotangents[1],)

    function = platform.custom_vjp(lambda x: ((x * 1, x + 1), ()), backward)
    x = _tensor(2, 3)
    _, pullback = platform.vjp(lambda x: ops.permute(function(x)[0], (1, 0)), x)
    cotangent = np.arange(6, dtype=np.float32).reshape(3, 2)
    (gradient,) = pullback(Tensor(cotangent))
    np.testing.assert_array_equal(gradient.asnumpy(), cotangent.T)
    assert seen == [[cotangent.T.tolist(), np.zeros((2, 3)).tolist()]]


def test_needed_tells_integers_apart(platform):
    seen = []

    def backward(residuals, cotangents, needed):
        seen.append(needed)
        return cotangents[0], None

    function = platform.custom_vjp(lambda x, i: (x + i, ()), backward)
    _, pullback = platform.vjp(function, _tensor(2), Tensor([1, 2], ms.int64))
    gradients = pullback(ops.ones((2,)))
    assert seen == [(True, False)]
    assert gradients[1].dtype == ms.int64


def test_a_pullback_inside_a_backward(platform):
    """Recomputation: the backward of a function evaluates it again and differentiates that."""

    def cube(x):
        return x * x * x

    def backward(residuals, cotangents, needed):
        _, pullback = platform.vjp(cube, residuals[0])
        return pullback(cotangents[0])

    x = _tensor(3)
    _, pullback = platform.vjp(platform.custom_vjp(lambda x: (cube(x), (x,)), backward), x)
    np.testing.assert_allclose(pullback(ops.ones((3,)))[0].asnumpy(), 3 * x.asnumpy() ** 2, rtol=1e-5)


def test_the_tape_of_mindspore_sees_custom_functions(platform):
    calls = []
    function = _scaled(platform, 4.0, calls)
    _loss, gradient = ms.value_and_grad(lambda x: ops.sum(function(x) * 2))(_tensor(3))
    assert _value(gradient) == 8.0
    assert calls == [4.0]


def test_stop_gradient(platform):
    x = _tensor(3)
    _, pullback = platform.vjp(lambda x: platform.stop_gradient(x) * x, x)
    np.testing.assert_allclose(pullback(ops.ones((3,)))[0].asnumpy(), x.asnumpy())


def test_the_tape_is_on_again_after_a_recursion_off_it(platform):
    @private_names.off_tape
    def countdown(n):
        return countdown(n - 1) if n else ops.zeros((2,))

    _, pullback = platform.vjp(lambda x: countdown(3) + x * 2, _tensor(2))
    assert _value(pullback(ops.ones((2,)))[0]) == 2.0
    _, pullback = platform.vjp(lambda x: x * 3, _tensor(2))
    assert _value(pullback(ops.ones((2,)))[0]) == 3.0
