# SPDX-License-Identifier: Apache-2.0
"""The array namespace against NumPy's own, function by function."""

import numpy as np
import pytest
import torch

from hyperep.platform.array_subset import ARRAY_ATTRIBUTES, ARRAY_DTYPES, ARRAY_FUNCTIONS, ARRAY_OPERATORS

X = np.array([[1.5, -2.0, 0.25], [3.0, 0.5, -1.0]], dtype=np.float32)
N = np.array([3, 1, 2, 1], dtype=np.int32)

# name -> (call on the namespace, the same in NumPy); ``a`` turns a NumPy array into a tensor.
CASES = {
    "arange": (lambda xp, a: xp.arange(2, 9, 3, dtype=xp.int32), np.arange(2, 9, 3, dtype=np.int32)),
    "arange of nothing": (lambda xp, a: xp.arange(4, 4), np.arange(4, 4)),
    "full": (lambda xp, a: xp.full((2, 3), 1.5, dtype=xp.float32), np.full((2, 3), 1.5, np.float32)),
    "ones": (lambda xp, a: xp.ones((2, 0), dtype=xp.int64), np.ones((2, 0), np.int64)),
    "zeros": (lambda xp, a: xp.zeros(3, dtype=xp.bool), np.zeros(3, np.bool_)),
    "zeros_like": (lambda xp, a: xp.zeros_like(a(N)), np.zeros_like(N)),
    "astype": (lambda xp, a: xp.astype(a(X), xp.int32), X.astype(np.int32)),
    "broadcast_to": (lambda xp, a: xp.broadcast_to(a(N), (2, 4)), np.broadcast_to(N, (2, 4))),
    "concat": (lambda xp, a: xp.concat([a(X), a(X[:, :0]), a(X)], axis=1), np.concatenate([X, X], axis=1)),
    "expand_dims": (lambda xp, a: xp.expand_dims(a(N), axis=1), N[:, None]),
    "permute_dims": (lambda xp, a: xp.permute_dims(a(X), (1, 0)), X.T),
    "reshape": (lambda xp, a: xp.reshape(a(X.T), (-1, 2)), X.T.reshape(-1, 2)),
    "stack": (lambda xp, a: xp.stack([a(X), a(X)], axis=1), np.stack([X, X], axis=1)),
    "argsort": (lambda xp, a: xp.argsort(a(N), stable=True), np.argsort(N, kind="stable")),
    "argsort, descending": (
        lambda xp, a: xp.argsort(a(N[None]), axis=1, descending=True, stable=True),
        np.argsort(-N[None], axis=1, kind="stable"),
    ),
    "searchsorted": (
        lambda xp, a: xp.searchsorted(a(np.sort(N)), a(N), side="right"),
        np.searchsorted(np.sort(N), N, side="right"),
    ),
    "take": (lambda xp, a: xp.take(a(X), a(np.array([1, 0, 1])), axis=0), X[[1, 0, 1]]),
    "take nothing": (lambda xp, a: xp.take(a(X), a(np.zeros(0, np.int64)), axis=0), X[:0]),
    "take_along_axis": (
        lambda xp, a: xp.take_along_axis(a(X), a(np.array([[2], [0]], np.int32)), axis=1),
        np.take_along_axis(X, np.array([[2], [0]]), axis=1),
    ),
    "where": (lambda xp, a: xp.where(a(X) > 0, a(X), 0.0), np.where(X > 0, X, np.float32(0))),
    "abs": (lambda xp, a: xp.abs(a(X)), np.abs(X)),
    "exp": (lambda xp, a: xp.exp(a(X)), np.exp(X)),
    "log": (lambda xp, a: xp.log(xp.abs(a(X))), np.log(np.abs(X))),
    "maximum": (lambda xp, a: xp.maximum(a(N), 2), np.maximum(N, 2)),
    "minimum": (lambda xp, a: xp.minimum(1, a(X)), np.minimum(np.float32(1), X)),
    "sqrt": (lambda xp, a: xp.sqrt(xp.abs(a(X))), np.sqrt(np.abs(X))),
    "tanh": (lambda xp, a: xp.tanh(a(X)), np.tanh(X)),
    "cumulative_sum": (lambda xp, a: xp.cumulative_sum(a(N)), np.cumsum(N, dtype=np.int64)),
    "cumulative_sum, from zero": (
        lambda xp, a: xp.cumulative_sum(a(X), axis=1, include_initial=True),
        np.concatenate([np.zeros((2, 1), np.float32), np.cumsum(X, axis=1)], axis=1),
    ),
    "matmul": (lambda xp, a: xp.matmul(a(X), a(X.T)), X @ X.T),
    "max": (lambda xp, a: xp.max(a(X), axis=-1, keepdims=True), X.max(-1, keepdims=True)),
    "mean": (lambda xp, a: xp.mean(a(X), axis=0), X.mean(0)),
    "min": (lambda xp, a: xp.min(a(X)), X.min()),
    "sum": (lambda xp, a: xp.sum(a(N), keepdims=True), N.sum(keepdims=True, dtype=np.int64)),
    "sum of nothing": (lambda xp, a: xp.sum(a(X[:0]), axis=0), X[:0].sum(0)),
}


def test_every_function_has_a_case():
    assert {name.split(",")[0].split(" of ")[0].split(" nothing")[0] for name in CASES} == set(ARRAY_FUNCTIONS)


@pytest.mark.parametrize(("call", "expected"), CASES.values(), ids=CASES)
def test_function_agrees_with_numpy(platform, call, expected):
    result = platform.to_host(call(platform.xp, platform.from_host))[0]
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_dtypes_operators_and_attributes_are_there(platform):
    for name in (*ARRAY_DTYPES, "float16", "bfloat16", "float64"):
        assert isinstance(getattr(platform.xp, name), torch.dtype)
    assert all(hasattr(torch.Tensor, name) for name in (*ARRAY_OPERATORS, *ARRAY_ATTRIBUTES))


def test_creation_functions_use_the_device_of_the_platform():
    from hyperep_torch.array_namespace import ArrayNamespace

    xp = ArrayNamespace(torch.device("meta"))
    made = [xp.arange(3), xp.full((2,), 1.0), xp.ones(2), xp.zeros(2)]
    assert {x.device.type for x in made} == {"meta"}


def test_functions_are_differentiable(platform):
    xp = platform.xp
    x = platform.from_host(X)

    def function(x):
        y = xp.take(xp.maximum(x, 0.0), platform.arange(2), axis=0) + xp.cumulative_sum(x, axis=1)
        return xp.sum(xp.take_along_axis(y, platform.from_host(np.array([[2], [0]])), axis=1))

    _, pullback = platform.vjp(function, x)
    (gradient,) = pullback(platform.from_host(np.float32(2.0)))
    # Row 0 picks column 2: the running sum of all three columns, and x itself; row 1 picks column 0.
    assert gradient.tolist() == [[2.0, 2.0, 4.0], [4.0, 0.0, 0.0]]
