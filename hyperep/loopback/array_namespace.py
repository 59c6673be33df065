# SPDX-License-Identifier: Apache-2.0
"""The array subset on NumPy, differentiable by the ``autograd`` package.

``autograd.numpy`` knows the derivatives but has NumPy's names and, here and there, NumPy's promotion to float64. The
functions below give it the names and dtypes of the Array API standard.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive
from autograd.tracer import getval, isbox

__all__ = ["array_namespace"]


def _raw(x: Any) -> np.ndarray:
    return np.asarray(getval(x))


@primitive
def _tanh(x: np.ndarray) -> np.ndarray:
    return np.tanh(x)


# autograd's own rule divides by cosh(x)**2, which overflows float32 where tanh is merely 1.
defvjp(_tanh, lambda y, x: lambda g: g * (1 - y * y))


@primitive
def _take_along_axis(x: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    return np.take_along_axis(x, indices, axis)


def _take_along_axis_vjp(y: Any, x: Any, indices: Any, axis: int) -> Any:
    def vjp(g: np.ndarray) -> np.ndarray:
        out = np.zeros(x.shape, x.dtype)
        where = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
        where[axis] = indices
        np.add.at(out, tuple(where), g)
        return out

    return vjp


defvjp(_take_along_axis, _take_along_axis_vjp, None, None)


@primitive
def _take_rows(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take(x, index, axis=0)


def _take_rows_vjp(y: Any, x: Any, index: Any) -> Any:
    def vjp(g: np.ndarray) -> np.ndarray:
        out = np.zeros(x.shape, x.dtype)
        np.add.at(out, index, g)
        return out

    return vjp


defvjp(_take_rows, _take_rows_vjp, None)


@primitive
def _astype(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype)


defvjp(_astype, lambda y, x, dtype: lambda g: g.astype(x.dtype), None)


@primitive
def _keep(x: np.ndarray) -> np.ndarray:
    return x


# autograd's own rules for choosing among elements make float64 gradients of float32 arrays.
defvjp(_keep, lambda y, x: lambda g: g.astype(x.dtype))


def _kept(x: Any) -> Any:
    return _keep(x) if isbox(x) else x


def _sum(x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    return anp.sum(x, axis=axis, keepdims=keepdims)


def _mean(x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    total = anp.sum(x, axis=axis, keepdims=keepdims)
    # Dividing by a Python int keeps float32, where anp.mean's own rule divides by a NumPy integer.
    return total / int(_raw(x).size // max(_raw(total).size, 1))


def _max(x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    return anp.max(_kept(x), axis=axis, keepdims=keepdims)


def _min(x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    return anp.min(_kept(x), axis=axis, keepdims=keepdims)


def _broadcast_to(x: Any, shape: Sequence[int]) -> Any:
    # autograd's own rule knows no new leading dims; with dims of one in their place it does.
    missing = len(shape) - _raw(x).ndim
    return anp.broadcast_to(anp.reshape(x, (1,) * missing + _raw(x).shape), tuple(shape))


def _argsort(x: Any, *, axis: int = -1, descending: bool = False, stable: bool = True) -> np.ndarray:
    values = _raw(x)
    if not descending:
        return np.argsort(values, axis=axis, kind="stable").astype(np.int64)
    # Sorting the reversed array and reversing back keeps the first of equals first, also in descending order.
    order = np.flip(np.argsort(np.flip(values, axis), axis=axis, kind="stable"), axis)
    return (values.shape[axis] - 1 - order).astype(np.int64)


def _searchsorted(x1: Any, x2: Any, *, side: str = "left", sorter: Any = None) -> np.ndarray:
    return np.searchsorted(_raw(x1), _raw(x2), side=side, sorter=sorter).astype(np.int64)  # type: ignore[call-overload]


def _take(x: Any, indices: Any, *, axis: int = 0) -> Any:
    if axis != 0:
        raise ValueError(f"take(axis={axis}): only axis=0 is in the array subset")
    return _take_rows(x, _raw(indices))


def _cumulative_sum(x: Any, *, axis: int | None = None, dtype: Any = None, include_initial: bool = False) -> Any:
    if axis is None:
        if _raw(x).ndim != 1:
            raise ValueError(f"cumulative_sum of {_raw(x).ndim} dims needs an axis")
        axis = 0
    out = anp.cumsum(x, axis=axis)
    if include_initial:
        shape = list(_raw(out).shape)
        shape[axis] = 1
        out = anp.concatenate([np.zeros(shape, _raw(out).dtype), out], axis=axis)
    return out if dtype is None else _astype(out, dtype)


def _creation(function: Any) -> Any:
    def create(shape: int | Sequence[int], *, dtype: Any = np.float32) -> np.ndarray:
        return function(shape, dtype=np.float32 if dtype is None else dtype)

    return create


def _full(shape: int | Sequence[int], fill_value: Any, *, dtype: Any = None) -> np.ndarray:
    if dtype is None:
        dtype = {bool: np.bool_, int: np.int64}.get(type(fill_value), np.float32)
    return np.full(shape, fill_value, dtype=dtype)


def _arange(start: Any, stop: Any = None, step: Any = 1, *, dtype: Any = None) -> np.ndarray:
    if dtype is None:
        dtype = np.int64 if all(isinstance(v, int) for v in (start, stop or 0, step)) else np.float32
    return np.arange(start, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype=dtype)


array_namespace = SimpleNamespace(
    __name__="hyperep.loopback.array_namespace",
    # dtypes
    bool=np.dtype(np.bool_),
    float32=np.dtype(np.float32),
    float64=np.dtype(np.float64),
    int32=np.dtype(np.int32),
    int64=np.dtype(np.int64),
    # creation
    arange=_arange,
    full=_full,
    ones=_creation(np.ones),
    zeros=_creation(np.zeros),
    zeros_like=lambda x, *, dtype=None: np.zeros_like(_raw(x), dtype=dtype),
    # dtype and shape
    astype=lambda x, dtype, *, copy=True: _astype(x, dtype),
    broadcast_to=_broadcast_to,
    concat=lambda arrays, *, axis=0: anp.concatenate(tuple(arrays), axis=axis),
    expand_dims=lambda x, *, axis=0: anp.expand_dims(x, axis),
    permute_dims=lambda x, axes: anp.transpose(x, tuple(axes)),
    reshape=lambda x, shape: anp.reshape(x, tuple(shape)),
    stack=lambda arrays, *, axis=0: anp.stack(tuple(arrays), axis=axis),
    # indexing, sorting, searching
    argsort=_argsort,
    searchsorted=_searchsorted,
    take=_take,
    take_along_axis=lambda x, indices, *, axis=-1: _take_along_axis(x, _raw(indices), axis),
    where=lambda condition, a, b: anp.where(_raw(condition), _kept(a), _kept(b)),
    # elementwise
    abs=anp.abs,
    exp=anp.exp,
    log=anp.log,
    maximum=lambda a, b: anp.maximum(_kept(a), _kept(b)),
    minimum=lambda a, b: anp.minimum(_kept(a), _kept(b)),
    sqrt=anp.sqrt,
    tanh=_tanh,
    # reductions and products
    cumulative_sum=_cumulative_sum,
    matmul=anp.matmul,
    max=_max,
    mean=_mean,
    min=_min,
    sum=_sum,
)
"""The ``xp`` of the loopback platform."""
