# SPDX-License-Identifier: Apache-2.0
"""Operators of CANN, as MindSpore calls them: their values and gradients against NumPy's."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, ops

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
BATCH = np.random.default_rng(2).normal(size=(3, 5, 2)).astype(np.float32)
PLACES = np.array([2, 0, 1, 2])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


OPERATORS = {
    "sums, products and differences": (
        lambda x: (x + x) * x - 2.0 * x / 3.0 + 1.0,
        lambda x: 2 * x * x - 2 * x / 3 + 1,
    ),
    "of a transposed view": (lambda x: ops.permute(x, (1, 0)) * 2.0, lambda x: x.T * 2),
    "broadcast": (lambda x: x + ops.broadcast_to(x[:1], (2, 4, 5)), lambda x: x + np.broadcast_to(x[:1], (2, 4, 5))),
    "slice": (lambda x: x[1:3, ::2] * 1.0, lambda x: x[1:3, ::2]),
    "matmul": (lambda x: mint.matmul(x, Tensor(Y)), lambda x: x @ Y),
    "matmul of views": (lambda x: ops.matmul(x[:, 1:].T, x[:, :2]), lambda x: x[:, 1:].T @ x[:, :2]),
    "batched matmul": (lambda x: ops.matmul(x, Tensor(BATCH)), lambda x: x @ BATCH),
    "sigmoid": (ops.sigmoid, sigmoid),
    "silu": (mint.nn.functional.silu, lambda x: x * sigmoid(x)),
    "tanh": (ops.tanh, np.tanh),
    "exp and log": (lambda x: ops.log(1.0 + ops.exp(x)), lambda x: np.log1p(np.exp(x))),
    "sqrt": (lambda x: ops.sqrt(ops.abs(x)), lambda x: np.sqrt(np.abs(x))),
    "power": (lambda x: x**2, lambda x: x**2),
    "softmax": (lambda x: ops.softmax(x, -1), softmax),
    "sum": (lambda x: ops.sum(x, 0), lambda x: x.sum(0)),
    "mean": (lambda x: mint.mean(x, 1), lambda x: x.mean(1)),
    "largest": (lambda x: ops.amax(x, (0,)), lambda x: x.max(0)),
    "smallest": (lambda x: ops.amin(x, (1,)), lambda x: x.min(1)),
    "running sum": (lambda x: mint.cumsum(x, 0), lambda x: x.cumsum(0)),
    "running sum, older": (lambda x: ops.cumsum(x, 1), lambda x: x.cumsum(1)),
    "concatenated": (lambda x: ops.cat([x, 2.0 * x[:, :2]], 1), lambda x: np.concatenate([x, 2 * x[:, :2]], 1)),
    "stacked": (lambda x: ops.stack([x, -x], 1), lambda x: np.stack([x, -x], 1)),
    "rows": (lambda x: mint.index_select(x, 0, Tensor(PLACES)), lambda x: x[PLACES]),
    "rows, older": (lambda x: ops.gather(x, Tensor(PLACES), 0), lambda x: x[PLACES]),
    "along an axis": (
        lambda x: mint.gather(x, 1, Tensor(PLACES[:, None])),
        lambda x: np.take_along_axis(x, PLACES[:, None], 1),
    ),
    "where": (lambda x: ops.where(x > 0, x, -2.0 * x), lambda x: np.where(x > 0, x, -2 * x)),
    "extremes of two": (
        lambda x: ops.maximum(x, -x) + ops.minimum(x, x * x),
        lambda x: np.abs(x) + np.minimum(x, x * x),
    ),
    "tiled": (lambda x: mint.tile(x, (2, 3)), lambda x: np.tile(x, (2, 3))),
    "through bfloat16": (
        lambda x: ops.cast(ops.cast(ops.cast(x * 8.0, ms.int32), ms.bfloat16), ms.float32),
        lambda x: (x * 8).astype(np.int32).astype(np.float32),
    ),
    "filled": (lambda x: ops.full((2, 2), 3.0, dtype=ms.float32), lambda x: np.full((2, 2), 3)),
    "counted": (lambda x: mint.arange(2, 11, 3), lambda x: np.arange(2, 11, 3)),
    "of no rows": (lambda x: ops.sum(x[:0], 1), lambda x: x[:0].sum(1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_numpys(name: str) -> None:
    """Wrong strides, offsets, broadcasting or types in an operator."""
    on_device, expected = OPERATORS[name]
    found = on_device(Tensor(X)).asnumpy()
    assert found.shape == expected(X).shape
    np.testing.assert_allclose(found, expected(X), rtol=2e-6, atol=2e-6)


DIFFERENTIABLE = (
    *("sums, products and differences", "of a transposed view", "broadcast", "matmul", "matmul of views", "sigmoid"),
    *(
        "silu",
        "tanh",
        "exp and log",
        "sqrt",
        "softmax",
        "sum",
        "largest",
        "concatenated",
        "rows",
        "rows, older",
        "where",
    ),
)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Backward operators of CANN that are another function's, or have their operands exchanged."""
    on_device, expected = OPERATORS[name]
    weights = np.random.default_rng(3).normal(size=expected(X).shape)
    found = ms.grad(lambda x: ops.sum(on_device(x) * Tensor(weights.astype(np.float32))))(Tensor(X)).asnumpy()
    wide, step = X.astype(np.float64), 1e-6
    for place in np.ndindex(X.shape):
        bump = np.zeros_like(wide)
        bump[place] = step
        slope = ((expected(wide + bump) - expected(wide - bump)) * weights).sum() / (2 * step)
        assert found[place] == pytest.approx(slope, rel=1e-3, abs=1e-4), place


def test_integers_are_exact() -> None:
    """Integers that go through a floating point type."""
    large = np.array([2**60 + 1, -(2**60) - 3, 5])
    x = Tensor(large)
    past = 2**53 + 1  # the first integer that no double is
    for arange in (mint.arange, ops.arange):
        np.testing.assert_array_equal(arange(past, past + 7, 2).asnumpy(), np.arange(past, past + 7, 2))
    np.testing.assert_array_equal((x + 1 - 1).asnumpy(), large)
    np.testing.assert_array_equal(mint.cumsum(x, 0).asnumpy(), large.cumsum())
    np.testing.assert_array_equal(mint.index_select(x, 0, Tensor([2, 0])).asnumpy(), large[[2, 0]])
    np.testing.assert_array_equal(ops.maximum(x, Tensor(large - 1)).asnumpy(), large)
    np.testing.assert_array_equal((x == Tensor(large + np.array([0, 1, 0]))).asnumpy(), [True, False, True])


@pytest.mark.parametrize("descending", [False, True])
def test_a_stable_sort_is_stable_and_another_is_not(descending: bool) -> None:
    """A program that counts on an order that it did not ask for, and CANN does not promise."""
    x = np.array([[3, 1, 1, 1], [2, 2, 0, 2]], np.float32)
    expected = np.argsort(-x if descending else x, 1, kind="stable")
    found = mint.sort(Tensor(x), dim=1, descending=descending, stable=True)[1].asnumpy()
    np.testing.assert_array_equal(found, expected)
    other = ops.argsort(Tensor(x), 1, descending).asnumpy()
    np.testing.assert_array_equal(np.take_along_axis(x, other, 1), np.take_along_axis(x, expected, 1))
    assert (other != expected).any()


def test_in_place_through_a_view() -> None:
    """A result that is written beside the tensor, or over its neighbours."""
    x, y = Tensor(X), X.copy()
    rows, slope = x[1:3], Tensor(X[0])
    rows += slope
    rows -= 3.0 * Tensor(X[1:3])
    y[1:3] += X[0] - 3 * X[1:3]
    np.testing.assert_allclose(x.asnumpy(), y, rtol=1e-5, atol=1e-6)


def test_descent_with_momentum_begins_with_the_first_gradient() -> None:
    """Against MindSpore's formula; where ``stat`` is positive, the velocity is the gradient itself."""
    parameters, gradient, velocity = np.random.default_rng(4).normal(size=(3, 4)).astype(np.float32)
    stat = np.array([1.5, -0.3, 0.2, -0.7], np.float32)
    held = [ms.Parameter(Tensor(x), name=name) for name, x in (("p", parameters), ("v", velocity), ("s", stat))]
    ops.SGD(dampening=0.25, weight_decay=0.5)(
        held[0], Tensor(gradient), Tensor(0.125, ms.float32), held[1], Tensor(0.75, ms.float32), held[2]
    )
    slope = gradient + 0.5 * parameters
    expected = np.where(stat > 0, slope, 0.75 * velocity + 0.75 * slope)
    np.testing.assert_allclose(held[1].asnumpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(held[0].asnumpy(), parameters - 0.125 * expected, rtol=1e-6)
    assert not held[2].asnumpy().any()


def test_an_optimizer_of_mindspore_steps() -> None:
    """It counts its steps by an operator that writes into its input."""
    weight = ms.Parameter(Tensor(X), name="weight")
    optimizer = ms.nn.SGD([weight], learning_rate=0.5, momentum=0.5)
    for _ in range(2):
        optimizer((Tensor(X),))
    # The velocities are X and then 1.5 X.
    np.testing.assert_allclose(weight.asnumpy(), X - 0.5 * X - 0.75 * X, rtol=1e-6)
    assert optimizer.global_step.asnumpy() == 2
