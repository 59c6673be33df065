# SPDX-License-Identifier: Apache-2.0
"""The array subset against NumPy, with empty tensors, and with the gradients of empty tensors."""

import mindspore as ms
import numpy as np
import pytest

from hyperep.platform.array_subset import ARRAY_DTYPES, ARRAY_FUNCTIONS
from hyperep.platform.errors import UnsupportedCapability

SHAPES = [(4, 3), (0, 3), (4, 0)]
DTYPES = ["float64", "float32", "float16", "int64", "int32"]


def _array(shape, dtype, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def _same(result, expected, dtype):
    assert tuple(result.shape) == expected.shape
    assert result.dtype == getattr(ms, dtype + "_" if dtype == "bool" else dtype)
    np.testing.assert_allclose(result.asnumpy(), expected, rtol=1e-3 if dtype == "float16" else 1e-6)


def test_every_name_of_the_subset_is_there(platform):
    assert [name for name in (*ARRAY_FUNCTIONS, *ARRAY_DTYPES) if not hasattr(platform.xp, name)] == []


def test_a_dtype_without_kernels_says_so(platform):
    with pytest.raises(UnsupportedCapability, match="bfloat16"):
        _ = platform.xp.bfloat16
    assert not hasattr(platform.xp, "bfloat16")


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
def test_sum(platform, shape, dtype, axis):
    x = _array(shape, dtype)
    summed = dtype if dtype.startswith("float") else "int64"
    _same(platform.xp.sum(platform.from_host(x), axis=axis), x.sum(axis, dtype=summed), summed)
    kept = platform.xp.sum(platform.from_host(x), axis=axis, keepdims=True)
    assert tuple(kept.shape) == x.sum(axis, keepdims=True).shape


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_mean(platform, dtype, axis):
    x = _array((4, 3), dtype)
    _same(platform.xp.mean(platform.from_host(x), axis=axis), np.asarray(x.mean(axis)), dtype)


def test_the_mean_of_nothing_is_nan(platform):
    assert np.isnan(platform.xp.mean(platform.xp.zeros((0, 2)), axis=0).asnumpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((4, 3), None), ((4, 3), 0), ((4, 3), -1), ((0, 3), 1), ((4, 0), 0)])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes(platform, name, shape, axis, dtype):
    x = _array(shape, dtype)
    result = getattr(platform.xp, name)(platform.from_host(x), axis=axis, keepdims=True)
    _same(result, getattr(np, name)(x, axis=axis, keepdims=True), dtype)


def test_the_largest_of_nothing_is_an_error(platform):
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        platform.xp.max(platform.xp.zeros((0, 3)), axis=0)


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_cumulative_sum(platform, shape, dtype, axis):
    x = _array(shape, dtype)
    summed = dtype if dtype.startswith("float") else "int64"
    expected = np.cumsum(x, axis, dtype=summed)
    _same(platform.xp.cumulative_sum(platform.from_host(x), axis=axis), expected, summed)
    zero = np.zeros_like(expected, shape=[1 if a == axis % 2 else n for a, n in enumerate(shape)])
    result = platform.xp.cumulative_sum(platform.from_host(x), axis=axis, include_initial=True)
    _same(result, np.concatenate([zero, expected], axis), summed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("shape", [(700,), (40, 17), (0,), (3, 0)])
def test_argsort_is_stable(platform, shape, descending, dtype):
    x = np.random.default_rng(1).integers(0, 4, shape).astype(dtype)
    order = platform.xp.argsort(platform.from_host(x), axis=-1, descending=descending, stable=True)
    _same(order, np.argsort(-x if descending else x, axis=-1, kind="stable"), "int64")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("known", "asked"), [(9, 5), (0, 5), (9, 0), (0, 0)])
def test_searchsorted(platform, known, asked, side, dtype):
    known, asked = np.sort(_array((known,), dtype)), _array((asked,), dtype, 1)
    result = platform.xp.searchsorted(platform.from_host(known), platform.from_host(asked), side=side)
    _same(result, np.searchsorted(known, asked, side=side), "int64")


@pytest.mark.parametrize("index_dtype", ["int64", "int32"])
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize(
    ("shape", "index"), [((4, 3), [2, 0, 2]), ((4, 3), []), ((0, 3), []), ((4,), [3]), ((4, 0), [1])]
)
def test_take(platform, shape, index, dtype, index_dtype):
    x, index = _array(shape, dtype), np.array(index, index_dtype)
    _same(platform.xp.take(platform.from_host(x), platform.from_host(index), axis=0), x[index], dtype)


@pytest.mark.parametrize(("rows", "chosen"), [(4, 2), (0, 2), (4, 0)])
def test_take_along_axis(platform, rows, chosen):
    x, index = _array((rows, 3), "float32"), np.arange(rows * chosen).reshape(rows, chosen) % 3
    result = platform.xp.take_along_axis(platform.from_host(x), platform.from_host(index), axis=1)
    _same(result, np.take_along_axis(x, index, 1), "float32")


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
@pytest.mark.parametrize(
    ("a", "b"), [((4, 3), (3, 5)), ((0, 3), (3, 5)), ((4, 0), (0, 5)), ((2, 4, 0), (2, 0, 5)), ((2, 4, 0), (0, 5))]
)
def test_matmul(platform, a, b, dtype):
    a, b = _array(a, dtype), _array(b, dtype, 1)
    _same(platform.xp.matmul(platform.from_host(a), platform.from_host(b)), a @ b, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("sizes", [(4, 3), (0, 3), (0, 0)])
def test_concat_and_stack(platform, sizes, dtype):
    xp = platform.xp
    arrays = [_array((n, 2), dtype, n) for n in sizes]
    _same(xp.concat([platform.from_host(a) for a in arrays], axis=0), np.concatenate(arrays), dtype)
    _same(
        xp.concat([platform.from_host(a.T) for a in arrays], axis=-1), np.concatenate([a.T for a in arrays], -1), dtype
    )
    twice = [arrays[0], arrays[0]]
    _same(xp.stack([platform.from_host(a) for a in twice], axis=1), np.stack(twice, 1), dtype)


@pytest.mark.parametrize("shape", [*SHAPES, ()])
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_creation(platform, shape, dtype):
    xp = platform.xp
    named = getattr(xp, dtype)
    _same(xp.zeros(shape, dtype=named), np.zeros(shape, dtype), dtype)
    _same(xp.ones(shape, dtype=named), np.ones(shape, dtype), dtype)
    _same(xp.full(shape, 1, dtype=named), np.full(shape, 1, dtype), dtype)
    _same(xp.zeros_like(xp.ones(shape, dtype=named)), np.zeros(shape, dtype), dtype)


@pytest.mark.parametrize("bounds", [(5,), (2, 9), (0, 10, 3), (5, 0, -2), (3, 3), (4, 1), (0,)])
def test_arange(platform, bounds):
    _same(platform.xp.arange(*bounds), np.arange(*bounds), "int64")
    _same(platform.arange(*bounds, dtype=platform.xp.int32), np.arange(*bounds, dtype=np.int32), "int32")


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(platform, shape):
    xp, x = platform.xp, _array(shape, "float32")
    given = platform.from_host(x)
    _same(
        xp.reshape(given, (-1, *shape[::-1])) if x.size else xp.reshape(given, (1, *shape[::-1])),
        x.reshape((1, *shape[::-1])),
        "float32",
    )
    _same(xp.permute_dims(given, (1, 0)), x.T, "float32")
    _same(xp.broadcast_to(given, (2, *shape)), np.broadcast_to(x, (2, *shape)), "float32")
    _same(xp.expand_dims(given, axis=1), x[:, None], "float32")


def test_scalars_take_the_dtype_of_the_tensor(platform):
    xp = platform.xp
    x = platform.from_host(np.array([-1.5, 2.5], np.float16))
    _same(xp.maximum(x, 0), np.array([0, 2.5], np.float16), "float16")
    _same(xp.minimum(0, x), np.array([-1.5, 0], np.float16), "float16")
    _same(xp.where(x > 0, x, 0.0), np.array([0, 2.5], np.float16), "float16")


EMPTY = {
    "sum": (lambda xp, x: xp.sum(x, axis=0), (0, 3)),
    "take": (lambda xp, x: xp.take(x, xp.zeros((0,), dtype=xp.int64), axis=0), (4, 3)),
    "take_along_axis": (lambda xp, x: xp.take_along_axis(x, xp.zeros((4, 0), dtype=xp.int64), axis=1), (4, 3)),
    "concat": (lambda xp, x: xp.concat([x, xp.zeros((0, 3)), x], axis=0), (0, 3)),
    "concat with rows": (lambda xp, x: xp.concat([xp.zeros((0, 3)), x, xp.zeros((2, 3))], axis=0)[4:], (4, 3)),
    "stack": (lambda xp, x: xp.stack([x, x], axis=0), (0, 3)),
    "matmul left": (lambda xp, x: xp.matmul(x, xp.ones((3, 5))), (0, 3)),
    "matmul right": (lambda xp, x: xp.matmul(xp.ones((0, 3)), x), (3, 5)),
    "matmul inner": (lambda xp, x: xp.matmul(xp.ones((4, 0)), x), (0, 5)),
    "operator @": (lambda xp, x: x @ xp.ones((3, 5)), (0, 3)),
    "exp": (lambda xp, x: xp.exp(x) * x + 1.0, (0, 3)),
    "softmax": (lambda xp, x: xp.exp(x) / xp.sum(xp.exp(x), axis=1, keepdims=True), (0, 3)),
    "reshape": (lambda xp, x: xp.reshape(x, (0, 1, 3)), (0, 3)),
    "permute": (lambda xp, x: xp.permute_dims(x, (1, 0)), (0, 3)),
    "astype": (lambda xp, x: xp.astype(xp.astype(x, xp.float16), xp.float32), (0, 3)),
    "bias": (lambda xp, x: xp.ones((0, 3)) + x, (3,)),
    "scale": (lambda xp, x: xp.ones((0, 3)) * x, (3,)),
    "slice": (lambda xp, x: x[2:2], (4, 3)),
    "mean": (lambda xp, x: xp.mean(x, axis=1), (0, 3)),
    "cumulative_sum": (lambda xp, x: xp.cumulative_sum(x, axis=0), (0, 3)),
    "broadcast": (lambda xp, x: xp.broadcast_to(x, (0, 4, 3)), (4, 3)),
    "max": (lambda xp, x: xp.max(x, axis=1), (0, 3)),
    "where": (lambda xp, x: xp.where(xp.ones((0, 3)) > 0, x, x), (3,)),
}


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize(("function", "shape"), EMPTY.values(), ids=EMPTY)
def test_gradients_through_nothing_are_zero(platform, function, shape):
    calls = []

    def backward(residuals, cotangents, needed):
        calls.append(cotangents[0].shape)
        return (cotangents[0],)

    xp = platform.xp
    marked = platform.custom_vjp(lambda x: (x + 0, ()), backward)
    outputs, pullback = platform.vjp(lambda x: function(xp, marked(x)), xp.ones(shape))
    (gradient,) = pullback(xp.ones(outputs.shape))
    assert tuple(gradient.shape) == shape
    assert not gradient.asnumpy().any()
    # The tape goes on below the empty result: a collective there has peers that wait for it.
    assert calls == [shape]


SMOOTH = {
    "exp": lambda xp, x: xp.exp(x),
    "log": lambda xp, x: xp.log(x * x + 1.0),
    "sqrt": lambda xp, x: xp.sqrt(x * x + 1.0),
    "tanh": lambda xp, x: xp.tanh(x),
    "abs": lambda xp, x: xp.abs(x),
    "maximum": lambda xp, x: xp.maximum(x, 0.1 * x),
    "take": lambda xp, x: xp.take(x, xp.arange(3), axis=0),
    "take_along_axis": lambda xp, x: xp.take_along_axis(x, xp.zeros((4, 2), dtype=xp.int64), axis=1),
    "cumulative_sum": lambda xp, x: xp.cumulative_sum(x, axis=1),
    "matmul": lambda xp, x: xp.matmul(x, xp.permute_dims(x, (1, 0))),
    "softmax": lambda xp, x: xp.exp(x) / xp.sum(xp.exp(x), axis=-1, keepdims=True),
    "max": lambda xp, x: xp.max(x, axis=1),
    "mean": lambda xp, x: xp.mean(x, axis=0, keepdims=True),
    "where": lambda xp, x: xp.where(x > 0, x * x, -1.0 * x),
    "stack": lambda xp, x: xp.stack([x, x * x], axis=1),
    "concat": lambda xp, x: xp.concat([x[1:], x * x], axis=0),
    "slice": lambda xp, x: x[1:4:2, None, ..., 1:],
    "power": lambda xp, x: x**3 / 2.0 - 1.0 / (x * x + 1.0),
}


@pytest.mark.parametrize("function", SMOOTH.values(), ids=SMOOTH)
def test_gradients_are_the_differences(platform, function):
    rng = np.random.default_rng(3)
    x, direction = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    outputs, pullback = platform.vjp(lambda x: function(platform.xp, x), platform.from_host(x))
    cotangent = rng.normal(size=outputs.shape)
    (gradient,) = pullback(platform.from_host(cotangent))
    step = 1e-6
    above, below = (function(platform.xp, platform.from_host(x + s * direction)).asnumpy() for s in (step, -step))
    expected = (cotangent * (above - below)).sum() / (2 * step)
    assert (gradient.asnumpy() * direction).sum() == pytest.approx(expected, rel=1e-6)
