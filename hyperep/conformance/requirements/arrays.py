# SPDX-License-Identifier: Apache-2.0
"""The array subset: each function's values, shapes and dtypes, also for arrays without elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.conformance import compare
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.platform.array_subset import ARRAY_DTYPES, ARRAY_FUNCTIONS
from hyperep.platform.capabilities import Capability

PORT = "arrays"


@dataclass(frozen=True)
class Example:
    """A call of a function of the namespace, and the same by NumPy. Results must agree in shape, dtype and values."""

    call: Callable[..., Any]
    """``call(xp, *tensors)``"""
    want: Callable[..., Any]
    """``want(*arrays)``"""
    inputs: tuple[np.ndarray, ...] = ()


F = np.random.default_rng(11).normal(size=(3, 4)).astype(np.float32)
POSITIVE = np.abs(F) + np.float32(0.5)
I64 = np.array([[5, -2, 7, 0], [1, 1, 3, -4], [2, 9, 2, 6]])
I32 = I64.astype(np.int32)
WHOLE = (np.array([2**30 + 1, -5]), np.array([2**31 - 1, -(2**31) + 1], np.int32))
"""Whole numbers that floats of 32 bits round."""
EMPTY = np.zeros((0, 4), np.float32)
TIES = np.array([[3, 1, 3, 2], [0, 0, 1, 0]])
MANY_TIES = np.random.default_rng(12).integers(0, 7, size=(3, 500))
"""More than the few elements that an unstable sort leaves in order by chance."""
SORTED = np.array([0, 2, 2, 5, 9])


def _unary(name: str, *, inputs: tuple[np.ndarray, ...] = (F, EMPTY)) -> tuple[Example, ...]:
    function = getattr(np, name)
    return tuple(Example(lambda xp, x: getattr(xp, name)(x), lambda x: function(x), (x,)) for x in inputs)


def _binary(name: str) -> tuple[Example, ...]:
    function = getattr(np, name)
    pairs = ((F, F[::-1].copy()), (I64, I64[::-1].copy()), (EMPTY, EMPTY), (F, F[:1]))
    return tuple(Example(lambda xp, x, y: getattr(xp, name)(x, y), lambda x, y: function(x, y), pair) for pair in pairs)


def _reduction(name: str, *, inputs: tuple[np.ndarray, ...] = (F, I64, I32)) -> tuple[Example, ...]:
    function = getattr(np, name)
    axes: tuple[tuple[Any, bool], ...] = ((None, False), (0, False), (1, True), (-1, False))
    return tuple(
        Example(
            lambda xp, x, a=axis, k=keep: getattr(xp, name)(x, axis=a, keepdims=k),
            lambda x, a=axis, k=keep: np.asarray(function(x, axis=a, keepdims=k)),
            (x,),
        )
        for x in inputs
        for axis, keep in axes
    )


def _shape(call: Callable[..., Any], want: Callable[..., Any]) -> tuple[Example, ...]:
    return tuple(Example(call, want, (x,)) for x in (F, I32, EMPTY))


def _filled(name: str, value: int) -> tuple[Example, ...]:
    def example(shape: tuple[int, ...], dtype: str) -> Example:
        return Example(
            lambda xp: getattr(xp, name)(shape, dtype=getattr(xp, dtype)),
            lambda: np.full(shape, value, dtype=dtype),
        )

    return tuple(example(shape, dtype) for shape in ((2, 3), (0, 4), (5,)) for dtype in ARRAY_DTYPES)


EXAMPLES: dict[str, tuple[Example, ...]] = {
    "arange": (
        Example(lambda xp: xp.arange(5, dtype=xp.int64), lambda: np.arange(5)),
        Example(lambda xp: xp.arange(2, 11, 3, dtype=xp.int32), lambda: np.arange(2, 11, 3, dtype=np.int32)),
        Example(lambda xp: xp.arange(0, dtype=xp.int64), lambda: np.arange(0)),
        Example(lambda xp: xp.arange(4, 4, dtype=xp.int64), lambda: np.arange(0)),
    ),
    "full": (
        Example(lambda xp: xp.full((2, 3), 7, dtype=xp.int32), lambda: np.full((2, 3), 7, np.int32)),
        Example(lambda xp: xp.full((3,), 0.5, dtype=xp.float32), lambda: np.full((3,), 0.5, np.float32)),
        Example(lambda xp: xp.full((0, 2), 1.0, dtype=xp.float32), lambda: np.full((0, 2), 1, np.float32)),
    ),
    "ones": _filled("ones", 1),
    "zeros": _filled("zeros", 0),
    "zeros_like": tuple(
        Example(lambda xp, x: xp.zeros_like(x), lambda x: np.zeros_like(x), (x,)) for x in (F, I32, EMPTY)
    )
    + (Example(lambda xp, x: xp.zeros_like(x, dtype=xp.int64), lambda x: np.zeros_like(x, dtype=np.int64), (F,)),),
    "astype": tuple(
        Example(lambda xp, x, d=dtype: xp.astype(x, getattr(xp, d)), lambda x, d=dtype: x.astype(d), (x,))
        for x in (
            I64,
            I32,
            EMPTY,
            *WHOLE,
            np.array([1.75, -2.25, 0.0], np.float32),
            np.array([True, False]),
        )
        for dtype in ARRAY_DTYPES
    ),
    "broadcast_to": (
        Example(lambda xp, x: xp.broadcast_to(x, (5, 3, 4)), lambda x: np.broadcast_to(x, (5, 3, 4)), (F,)),
        Example(lambda xp, x: xp.broadcast_to(x, (3, 6)), lambda x: np.broadcast_to(x, (3, 6)), (I64[:, :1].copy(),)),
        Example(lambda xp, x: xp.broadcast_to(x, (0, 4)), lambda x: np.broadcast_to(x, (0, 4)), (F[:1],)),
    ),
    "concat": (
        Example(lambda xp, a, b: xp.concat([a, b], axis=0), lambda a, b: np.concatenate([a, b]), (F, POSITIVE)),
        Example(lambda xp, a, b: xp.concat([a, b], axis=0), lambda a, b: np.concatenate([a, b]), (EMPTY, F)),
        Example(lambda xp, a, b: xp.concat([a, b], axis=1), lambda a, b: np.concatenate([a, b], 1), (I32, I32)),
        Example(lambda xp, a: xp.concat([a], axis=0), lambda a: a, (EMPTY,)),
    ),
    "expand_dims": _shape(lambda xp, x: xp.expand_dims(x, axis=1), lambda x: x[:, None])
    + _shape(lambda xp, x: xp.expand_dims(x, axis=-1), lambda x: x[..., None]),
    "permute_dims": _shape(lambda xp, x: xp.permute_dims(x, (1, 0)), lambda x: x.T)
    + (Example(lambda xp, x: xp.permute_dims(x, (2, 0, 1)), lambda x: x.transpose(2, 0, 1), (F.reshape(3, 2, 2),)),),
    "reshape": _shape(lambda xp, x: xp.reshape(x, (-1, 2, 2)), lambda x: x.reshape(len(x), 2, 2))
    + (
        Example(lambda xp, x: xp.reshape(xp.permute_dims(x, (1, 0)), (12,)), lambda x: x.T.reshape(12), (F,)),
        Example(lambda xp, x: xp.reshape(x, (2, 0)), lambda x: x.reshape(2, 0), (EMPTY,)),
    ),
    "stack": (
        Example(lambda xp, a, b: xp.stack([a, b]), lambda a, b: np.stack([a, b]), (F, POSITIVE)),
        Example(lambda xp, a, b: xp.stack([a, b], axis=1), lambda a, b: np.stack([a, b], 1), (I32, I32)),
        Example(lambda xp, a, b: xp.stack([a, b], axis=0), lambda a, b: np.stack([a, b]), (EMPTY, EMPTY)),
    ),
    "argsort": tuple(
        Example(
            lambda xp, x, a=axis: xp.argsort(x, axis=a, stable=True),
            lambda x, a=axis: np.argsort(x, axis=a, kind="stable"),
            (x,),
        )
        for x in (
            *(F, TIES, TIES.astype(np.int32), TIES.astype(np.float32), np.zeros((3, 0), np.int64)),
            *(MANY_TIES, MANY_TIES.astype(np.int32), MANY_TIES.astype(np.float32)),
        )
        for axis in (1, -1)
    )
    + tuple(
        Example(
            lambda xp, x: xp.argsort(x, axis=1, descending=True, stable=True),
            lambda x: np.argsort(-x, axis=1, kind="stable"),
            (x,),
        )
        for x in (F, TIES, TIES.astype(np.int32), TIES.astype(np.float32), MANY_TIES, MANY_TIES.astype(np.float32))
    )
    + (
        Example(
            lambda xp, x: xp.argsort(x, axis=0, descending=True, stable=True),
            lambda x: np.argsort(-x, axis=0, kind="stable"),
            (MANY_TIES.T.copy(),),
        ),
        Example(lambda xp, x: xp.argsort(x, stable=True), lambda x: np.argsort(x, kind="stable"), (TIES.ravel(),)),
    ),
    "searchsorted": tuple(
        Example(
            lambda xp, x, v, s=side: xp.searchsorted(x, v, side=s),
            lambda x, v, s=side: np.searchsorted(x, v, side=s),
            (SORTED.astype(dtype), np.arange(-1, 11).astype(dtype)),
        )
        for side in ("left", "right")
        for dtype in ("int64", "int32", "float32")
    )
    + (Example(lambda xp, x, v: xp.searchsorted(x, v), np.searchsorted, (np.zeros(0, np.int64), np.arange(3))),),
    "take": tuple(
        Example(lambda xp, x, i: xp.take(x, i, axis=0), lambda x, i: x[i], (x, i))
        for x in (F, I32, F.reshape(3, 2, 2), F[:, 0].copy())
        for i in (np.array([2, 0, 0, 1]), np.zeros(0, np.int64))
    )
    + (Example(lambda xp, x, i: xp.take(x, i, axis=0), lambda x, i: x[i], (EMPTY, np.zeros(0, np.int64))),),
    "take_along_axis": (
        Example(
            lambda xp, x, i: xp.take_along_axis(x, i, axis=1),
            lambda x, i: np.take_along_axis(x, i, 1),
            (F, np.array([[3, 0], [1, 1], [2, 3]])),
        ),
        Example(
            lambda xp, x, i: xp.take_along_axis(x, i, axis=1),
            lambda x, i: np.take_along_axis(x, i, 1),
            (EMPTY, np.zeros((0, 2), np.int64)),
        ),
    ),
    "where": (
        Example(lambda xp, x, y: xp.where(x > y, x, y), lambda x, y: np.where(x > y, x, y), (F, F[::-1].copy())),
        Example(lambda xp, x, y: xp.where(x > y, x, y), lambda x, y: np.where(x > y, x, y), (I32, I32[:1])),
        Example(lambda xp, x, y: xp.where(x > y, x, y), lambda x, y: np.where(x > y, x, y), (EMPTY, EMPTY)),
    ),
    "abs": _unary("abs", inputs=(F, I64, EMPTY)),
    "exp": _unary("exp"),
    "log": _unary("log", inputs=(POSITIVE, EMPTY)),
    "maximum": _binary("maximum"),
    "minimum": _binary("minimum"),
    "sqrt": _unary("sqrt", inputs=(POSITIVE, EMPTY)),
    "tanh": _unary("tanh", inputs=(F, EMPTY, np.array([-90, 90], np.float32))),
    "cumulative_sum": tuple(
        Example(
            lambda xp, x, i=initial: xp.cumulative_sum(x, include_initial=i),
            lambda x, i=initial: np.concatenate([np.zeros(int(i), x.dtype), x]).cumsum(),
            (x,),
        )
        for x in (SORTED, SORTED.astype(np.int32), np.zeros(0, np.int64))
        for initial in (False, True)
    )
    + (Example(lambda xp, x: xp.cumulative_sum(x, axis=1), lambda x: x.cumsum(axis=1), (F,)),),
    "matmul": (
        Example(lambda xp, a, b: xp.matmul(a, b), lambda a, b: a @ b, (F, F.T.copy())),
        Example(lambda xp, a, b: xp.matmul(a, b), lambda a, b: a @ b, (EMPTY, F.T.copy())),
        Example(lambda xp, a, b: xp.matmul(a, b), lambda a, b: a @ b, (np.zeros((2, 0), np.float32), EMPTY)),
        Example(
            lambda xp, a, b: xp.matmul(a, b), lambda a, b: a @ b, (np.stack([F, POSITIVE]), np.stack([F.T, POSITIVE.T]))
        ),
    ),
    "max": _reduction("max"),
    "mean": _reduction("mean", inputs=(F,)),
    "min": _reduction("min"),
    "sum": _reduction("sum")
    + (
        Example(lambda xp, x: xp.sum(x, axis=0), lambda x: x.sum(axis=0), (EMPTY,)),
        Example(lambda xp, x: xp.sum(x, axis=(0, 1)), lambda x: np.asarray(x.sum()), (F,)),
        Example(lambda xp, x: xp.sum(x), lambda x: np.asarray(x.sum()), (np.array([True, True, False]),)),
    ),
}


def _agree(case: Case, examples: tuple[Example, ...]) -> None:
    for number, example in enumerate(examples):
        shown = [f"{x.dtype}{list(x.shape)}" for x in example.inputs]
        case.note(example=number, inputs=shown)
        got = case.host(example.call(case.xp, *(case.tensor(x) for x in example.inputs)))
        want = np.asarray(example.want(*example.inputs))
        what = f"example {number} on {', '.join(shown) or 'no input'}"
        if want.dtype.kind == "f":
            case.is_true(got.dtype == want.dtype, f"{what}: dtype {got.dtype}, must be {want.dtype}")
            compare.near(got, want, what, 2e-6)
        else:
            compare.same(got, want, what)


def _of_function(name: str) -> Requirement:
    return requirement(
        f"XP-{name.replace('_', '-')}",
        f"xp.{name} gives the values, shapes and dtypes of the Array API standard, also without elements.",
        port=PORT,
        needs=("HOST-roundtrip",),
    )(lambda case: _agree(case, EXAMPLES[name]))


FUNCTIONS = tuple(_of_function(name) for name in ARRAY_FUNCTIONS)


@requirement(
    "XP-dtypes",
    "xp has the dtype objects of the subset; a tensor's dtype equals the one it was made with, and no other.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def dtypes(case: Case) -> None:
    for name in ARRAY_DTYPES:
        made = case.xp.zeros((2,), dtype=getattr(case.xp, name))
        for other in ARRAY_DTYPES:
            equal = made.dtype == getattr(case.xp, other)
            case.is_true(equal == (name == other), f"a tensor of {name}: dtype == xp.{other} is {equal}")
        came = case.tensor(np.zeros((2,), dtype=name))
        case.is_true(came.dtype == getattr(case.xp, name), f"from_host of NumPy's {name} gave {came.dtype}")


@requirement(
    "XP-operators",
    "Arithmetic, comparison and matmul operators agree with NumPy, and Python scalars do not change the dtype.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def operators(case: Case) -> None:
    both = (
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x / y,
        lambda x, y: -x,
        lambda x, y: x**2,
        lambda x, y: x @ y.T if isinstance(x, np.ndarray) else x @ case.xp.permute_dims(y, (1, 0)),
        lambda x, y: x < y,
        lambda x, y: x <= y,
        lambda x, y: x > y,
        lambda x, y: x >= y,
        lambda x, y: x == y,
        lambda x, y: x != y,
    )
    scalar = (
        lambda x: x + 2,
        lambda x: 2 - x,
        lambda x: x - 2,
        lambda x: 0.5 * x,
        lambda x: x * 3,
        lambda x: x / 4,
        lambda x: 3.0 / x,
        lambda x: 1 + x,
    )
    integer = (lambda x: x + 1, lambda x: 2 * x, lambda x: x - 3, lambda x: 5 - x)
    examples = [Example(lambda xp, x, y, f=f: f(x, y), lambda x, y, f=f: f(x, y), (F, POSITIVE)) for f in both]
    examples += [Example(lambda xp, x, f=f: f(x), lambda x, f=f: f(x), (POSITIVE,)) for f in scalar]
    examples += [Example(lambda xp, x, f=f: f(x), lambda x, f=f: f(x), (x,)) for f in integer for x in (I64, I32)]
    _agree(case, tuple(examples))


@requirement(
    "XP-getitem",
    "Indexing by integers, slices with positive step, None and ... agrees with NumPy, also where nothing is left.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def getitem(case: Case) -> None:
    keys: tuple[Any, ...] = (
        0,
        slice(1, 3),
        slice(None, None, 2),
        slice(2, 2),
        (slice(None), slice(0, 2)),
        (slice(None), 1),
        (..., slice(1, 4, 2)),
        (None, slice(None)),
        (1, 2),
        slice(0, 99),
    )
    examples = [Example(lambda xp, x, k=k: x[k], lambda x, k=k: np.asarray(x[k]), (x,)) for k in keys for x in (F, I32)]
    _agree(case, tuple(examples))


@requirement(
    "XP-attributes",
    "shape and ndim of a tensor are those of the array; sizes are ints.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def attributes(case: Case) -> None:
    for shape in ((3, 4), (0, 5), (7,), (2, 0, 3)):
        tensor = case.tensor(np.zeros(shape, np.float32))
        case.is_true(tuple(tensor.shape) == shape, f"shape is {tensor.shape!r}, must be {shape}")
        case.is_true(tensor.ndim == len(shape), f"ndim is {tensor.ndim!r}, must be {len(shape)}")
        case.is_true(all(isinstance(int(n), int) for n in tensor.shape), "sizes must be ints")


def _dtype(name: str, capability: Capability, digits: int, top: int) -> Requirement:
    def check(case: Case) -> None:
        xp, of, step, largest = case.xp, case.dtype(name), 2.0**-digits, 2.0**top
        x = case.tensor(np.array([[1, 3], [1.5, -2]], np.float32), name)
        one = xp.ones((2, 2), dtype=of)
        # One step above one, which a narrower dtype would round away, and one that overflows in a dtype of less range.
        fine, large = one + step, xp.full((2, 2), largest, dtype=of)
        index = case.tensor(np.array([1, 0]))
        for what, got, want in (
            ("values", x, [[1, 3], [1.5, -2]]),
            ("1 + the smallest step", fine, np.full((2, 2), 1 + step)),
            ("the same, less 1", fine - one, np.full((2, 2), step)),
            ("a product with it", fine * x, np.array([[1, 3], [1.5, -2]]) * (1 + step)),
            ("a large value", large, np.full((2, 2), largest)),
            ("a large value, divided", large / (2 * one), np.full((2, 2), largest / 2)),
            ("a sum", xp.sum(x, axis=0), [2.5, 1]),
            ("a product of matrices", xp.matmul(x, one), [[4, 4], [-0.5, -0.5]]),
            ("where", xp.where(x > one, fine, x), [[1, 1 + step], [1 + step, -2]]),
            ("maximum", xp.maximum(x, fine), [[1 + step, 3], [1.5, 1 + step]]),
            ("concat", xp.concat([x, fine], axis=0), [[1, 3], [1.5, -2], [1 + step] * 2, [1 + step] * 2]),
            ("take", xp.take(x, index, axis=0), [[1.5, -2], [1, 3]]),
            ("a scalar, added", x + 1, [[2, 4], [2.5, -1]]),
            ("a scalar, multiplied", 0.5 * x, [[0.5, 1.5], [0.75, -1]]),
            ("the absolute value", xp.abs(x), [[1, 3], [1.5, 2]]),
        ):
            case.is_true(got.dtype == of, f"{what}: the result has dtype {got.dtype}, must be {name}")
            same_values = np.asarray(want, "float32" if name == "bfloat16" else name)
            if what == "a product with it":  # rounded, where a mantissa has no room
                case.close(got, same_values, what, 2 * step)
            else:
                case.equal(got, same_values, what)

    return requirement(
        f"DTYPE-{name}",
        f"Where {capability.value} is declared, xp.{name} exists, has its precision and range, is kept by arithmetic "
        "and arrives on the host" + (" as float32." if name == "bfloat16" else "."),
        port=PORT,
        level=Level.OPTIONAL,
        capabilities=(capability,),
        needs=(
            "XP-astype",
            "XP-concat",
            "XP-full",
            "XP-matmul",
            "XP-maximum",
            "XP-ones",
            "XP-sum",
            "XP-take",
            "XP-where",
        ),
    )(check)


DTYPES = (
    _dtype("float64", Capability.FLOAT64, 52, 1000),
    _dtype("float16", Capability.FLOAT16, 10, 15),
    _dtype("bfloat16", Capability.BFLOAT16, 7, 120),
)
