# SPDX-License-Identifier: Apache-2.0
"""The array subset of the core, on MindSpore.

Functions of :mod:`mindspore.ops` are used where the documented ones of :mod:`mindspore.mint` have no CPU kernel. Where
MindSpore has a kernel that is wrong for empty tensors, the answer, which is then known beforehand, is given instead:
CPU kernels leave the result of a sum or a product over nothing as it was in memory, and the backwards of a gather, of
``concat`` and of ``stack`` fail. These answers are connected to the inputs, so that a collective whose result is empty
is still differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep_mindspore.autodiff import custom_vjp
from hyperep_mindspore.kernels import Kernels

__all__ = ["ArrayNamespace"]

Axis = int | tuple[int, ...] | None


class MissingDtype(UnsupportedCapability, AttributeError):
    """A dtype that the device has no kernels for: also an absent attribute, so that ``hasattr`` answers."""


class ArrayNamespace:
    """The namespace. ``float64`` and ``bfloat16`` are there only if the platform declares them.

    Args:
        platform: name of the platform, for errors.
        capabilities: what it declares; the optional dtypes are looked up here.
        kernels: functions that depend on the device.
    """

    bool = ms.bool_
    int32 = ms.int32
    int64 = ms.int64
    float32 = ms.float32

    def __init__(self, platform: str, capabilities: dict[Capability, Support], kernels: Kernels) -> None:
        self._platform = platform
        self._capabilities = capabilities
        self._kernels = kernels

    def _optional(self, capability: Capability, dtype: Any) -> Any:
        if self._capabilities.get(capability, Support.UNSUPPORTED) is Support.UNSUPPORTED:
            raise MissingDtype(
                self._platform, capability, f"MindSpore has no {capability.value} kernels here; use float32"
            )
        return dtype

    @property
    def float16(self) -> Any:
        """Half precision."""
        return self._optional(Capability.FLOAT16, ms.float16)

    @property
    def bfloat16(self) -> Any:
        """Brain floating point."""
        return self._optional(Capability.BFLOAT16, ms.bfloat16)

    @property
    def float64(self) -> Any:
        """Double precision."""
        return self._optional(Capability.FLOAT64, ms.float64)

    # ---------------------------------------------------------------------------------------------- creation
    def arange(self, start: Any, /, stop: Any = None, step: Any = 1, *, dtype: Any = None) -> Tensor:  # noqa: D102
        if stop is None:
            start, stop = 0, start
        if dtype is None:
            dtype = ms.int64 if all(isinstance(v, int) for v in (start, stop, step)) else ms.float32
        if math.ceil((stop - start) / step) <= 0:
            return ops.zeros((0,), dtype)
        return self._kernels.arange(start, stop, step, dtype)

    def full(self, shape: int | Sequence[int], fill_value: Any, *, dtype: Any = None) -> Tensor:  # noqa: D102
        if dtype is None:
            dtype = {bool: ms.bool_, int: ms.int64}.get(type(fill_value), ms.float32)
        return self._kernels.full(_shape(shape), fill_value, dtype)

    @staticmethod
    def ones(shape: int | Sequence[int], *, dtype: Any = None) -> Tensor:  # noqa: D102
        return ops.ones(_shape(shape), dtype or ms.float32)

    @staticmethod
    def zeros(shape: int | Sequence[int], *, dtype: Any = None) -> Tensor:  # noqa: D102
        return ops.zeros(_shape(shape), dtype or ms.float32)

    @staticmethod
    def zeros_like(x: Tensor, /, *, dtype: Any = None) -> Tensor:  # noqa: D102
        return ops.zeros(x.shape, dtype or x.dtype)

    # --------------------------------------------------------------------------------------- dtype and shape
    def astype(self, x: Tensor, dtype: Any, /, *, copy: Any = True) -> Tensor:  # noqa: D102
        # A cast to the dtype that is there already returns the tensor itself.
        return self._kernels.clone(x) if copy and x.dtype == dtype else ops.cast(x, dtype)

    @staticmethod
    def broadcast_to(x: Tensor, /, shape: Sequence[int]) -> Tensor:  # noqa: D102
        return ops.broadcast_to(x, tuple(shape))

    @staticmethod
    def concat(arrays: Sequence[Tensor], /, *, axis: int | None = 0) -> Tensor:  # noqa: D102
        if axis is None:
            arrays, axis = [ops.reshape(a, (-1,)) if _size(a) else ops.reshape(a, (0,)) for a in arrays], 0
        if all(_size(a) for a in arrays):
            return ops.cat(list(arrays), axis)
        return _concat_with_empties(arrays, axis)

    @staticmethod
    def expand_dims(x: Tensor, /, *, axis: int = 0) -> Tensor:  # noqa: D102
        return ops.expand_dims(x, axis)

    @staticmethod
    def permute_dims(x: Tensor, /, axes: Sequence[int]) -> Tensor:  # noqa: D102
        return ops.permute(x, tuple(axes))

    @staticmethod
    def reshape(x: Tensor, /, shape: Sequence[int], *, copy: Any = None) -> Tensor:  # noqa: D102
        return ops.reshape(x, _shape(shape))

    def stack(self, arrays: Sequence[Tensor], /, *, axis: int = 0) -> Tensor:  # noqa: D102
        if all(_size(a) for a in arrays):
            return self._kernels.stack(arrays, axis)
        return self.concat([ops.expand_dims(a, axis) for a in arrays], axis=axis)

    # --------------------------------------------------------------------------- indexing, sorting, searching
    def argsort(  # noqa: D102
        self, x: Tensor, /, *, axis: int = -1, descending: Any = False, stable: Any = True
    ) -> Tensor:
        if not _size(x):
            return ops.zeros(x.shape, ms.int64)
        return self._kernels.argsort(x, axis, descending)

    def searchsorted(  # noqa: D102
        self, x1: Tensor, x2: Tensor, /, *, side: str = "left", sorter: Tensor | None = None
    ) -> Tensor:
        if not _size(x2) or not _size(x1):
            return ops.zeros(x2.shape, ms.int64)
        if sorter is not None:
            x1 = self._kernels.take(x1, sorter, 0)
        return self._kernels.searchsorted(x1, x2, side == "right")

    def take(self, x: Tensor, indices: Tensor, /, *, axis: int = 0) -> Tensor:
        """Gather along *axis* by non-negative one-dimensional *indices*."""
        shape = list(x.shape)
        shape[axis] = indices.shape[0]
        return self._kernels.take(x, indices, axis) if math.prod(shape) else _empty(tuple(shape), x)

    @staticmethod
    def take_along_axis(x: Tensor, indices: Tensor, /, *, axis: int = -1) -> Tensor:
        """Gather along *axis* by non-negative *indices* of the same number of dims."""
        if not _size(indices):
            return _empty(indices.shape, x)
        return ops.gather_elements(x, axis, ops.cast(indices, ms.int64))

    @staticmethod
    def where(condition: Tensor, x1: Any, x2: Any, /) -> Tensor:  # noqa: D102
        return ops.where(condition, x1, x2)

    # ------------------------------------------------------------------------------------------- elementwise
    @staticmethod
    def abs(x: Tensor, /) -> Tensor:  # noqa: D102
        return ops.abs(x)

    @staticmethod
    def exp(x: Tensor, /) -> Tensor:  # noqa: D102
        return ops.exp(x)

    @staticmethod
    def log(x: Tensor, /) -> Tensor:  # noqa: D102
        return ops.log(x)

    @staticmethod
    def maximum(x1: Any, x2: Any, /) -> Tensor:  # noqa: D102
        return ops.maximum(*_same_dtype(x1, x2))

    @staticmethod
    def minimum(x1: Any, x2: Any, /) -> Tensor:  # noqa: D102
        return ops.minimum(*_same_dtype(x1, x2))

    @staticmethod
    def sqrt(x: Tensor, /) -> Tensor:  # noqa: D102
        return ops.sqrt(x)

    @staticmethod
    def tanh(x: Tensor, /) -> Tensor:
        """By the logistic function: the CPU's own float32 kernel is off by 1e-4."""
        return 2.0 * ops.sigmoid(2.0 * x) - 1.0

    # ------------------------------------------------------------------------------- reductions and products
    def cumulative_sum(
        self, x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: Any = False
    ) -> Tensor:
        """Running sum along *axis*, which may be left out for one dim; integers are summed in int64."""
        if axis is None:
            if x.ndim != 1:
                raise ValueError(f"cumulative_sum of {x.ndim} dims needs an axis")
            axis = 0
        x = ops.cast(x, dtype or _sum_dtype(x.dtype))
        total = self._kernels.cumsum(x, axis) if _size(x) else x
        if not include_initial:
            return total
        shape = list(total.shape)
        shape[axis] = 1
        return ArrayNamespace.concat([ops.zeros(tuple(shape), total.dtype), total], axis=axis)

    @staticmethod
    def matmul(x1: Tensor, x2: Tensor, /) -> Tensor:  # noqa: D102
        if _size(x1) and _size(x2):
            return ops.matmul(x1, x2)
        return _empty_matmul(x1, x2)

    @staticmethod
    def max(x: Tensor, /, *, axis: Axis = None, keepdims: Any = False) -> Tensor:  # noqa: D102
        return _extreme(ops.amax, x, axis, keepdims)

    def mean(self, x: Tensor, /, *, axis: Axis = None, keepdims: Any = False) -> Tensor:  # noqa: D102
        total = self.sum(x, axis=axis, keepdims=keepdims)
        count = math.prod(x.shape[a] for a in _axes(x, axis))
        return total / count if count else total * math.nan

    @staticmethod
    def min(x: Tensor, /, *, axis: Axis = None, keepdims: Any = False) -> Tensor:  # noqa: D102
        return _extreme(ops.amin, x, axis, keepdims)

    def sum(  # noqa: D102
        self, x: Tensor, /, *, axis: Axis = None, dtype: Any = None, keepdims: Any = False
    ) -> Tensor:
        x = ops.cast(x, dtype or _sum_dtype(x.dtype))
        axes = _axes(x, axis)
        if not axes:
            return x
        return self._kernels.sum(x, axes, keepdims) if _size(x) else _empty(_reduced(x.shape, axes, keepdims), x)

    def __repr__(self) -> str:
        return f"ArrayNamespace({self._platform})"


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)


def _size(x: Tensor) -> int:
    return math.prod(x.shape)


def _axes(x: Tensor, axis: Axis) -> tuple[int, ...]:
    chosen = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    return tuple(a % x.ndim for a in chosen)


def _reduced(shape: Sequence[int], axes: Sequence[int], keepdims: bool) -> tuple[int, ...]:
    kept = [1 if a in axes else n for a, n in enumerate(shape)]
    return tuple(n for a, n in enumerate(kept) if keepdims or a not in axes)


def _sum_dtype(dtype: Any) -> Any:
    return dtype if dtype in (ms.float16, ms.bfloat16, ms.float32, ms.float64) else ms.int64


def _same_dtype(x1: Any, x2: Any) -> tuple[Tensor, Tensor]:
    """A Python scalar on either side becomes a tensor of the other's dtype."""
    if not isinstance(x1, Tensor):
        x1 = Tensor(x1, x2.dtype)
    if not isinstance(x2, Tensor):
        x2 = Tensor(x2, x1.dtype)
    return x1, x2


def _extreme(function: Any, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    axes = _axes(x, axis)
    if not axes:
        return x
    if not _size(x):
        shape = _reduced(x.shape, axes, keepdims)
        if math.prod(shape):
            raise ValueError(f"the largest or smallest of nothing: shape {x.shape} along {axes}; leave empty axes out")
        return _empty(shape, x)
    return function(x, axes, keepdims)


def _empty(shape: Sequence[int], x: Tensor) -> Tensor:
    """Zeros of *shape*, the answer of any linear function where nothing goes in or nothing comes out.

    Its backward is the same: zeros of the shape of *x*.
    """
    shape, given, dtype = tuple(shape), x.shape, x.dtype
    return custom_vjp(
        lambda x: (ops.zeros(shape, dtype), ()),
        lambda residuals, cotangents, needed: (ops.zeros(given, dtype),),
    )(x)


def _empty_matmul(x1: Tensor, x2: Tensor) -> Tensor:
    """The product where one factor is empty: zeros, whose gradients are zeros."""
    if x1.ndim < 2 or x2.ndim < 2 or x1.shape[-1] != x2.shape[-2]:
        raise ValueError(f"matmul of the shapes {x1.shape} and {x2.shape}; give [..., N, K] and [..., K, M]")
    batch = tuple(max(a, b) if a and b else 0 for a, b in _aligned(x1.shape[:-2], x2.shape[:-2]))
    shape, shapes, dtype = (*batch, x1.shape[-2], x2.shape[-1]), (x1.shape, x2.shape), x1.dtype
    return custom_vjp(
        lambda x1, x2: (ops.zeros(shape, dtype), ()),
        lambda residuals, cotangents, needed: tuple(ops.zeros(s, dtype) for s in shapes),
    )(x1, x2)


def _aligned(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    n = max(len(a), len(b))
    return list(zip((1,) * (n - len(a)) + tuple(a), (1,) * (n - len(b)) + tuple(b), strict=True))


def _concat_with_empties(arrays: Sequence[Tensor], axis: int) -> Tensor:
    """``concat`` with a backward that knows empty parts."""
    axis %= arrays[0].ndim
    sizes = [a.shape[axis] for a in arrays]

    def forward(*arrays: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        full = [a for a in arrays if _size(a)]
        if full:
            return ops.cat(full, axis), ()
        shape = list(arrays[0].shape)
        shape[axis] = sum(sizes)
        return ops.zeros(tuple(shape), arrays[0].dtype), ()

    def backward(residuals: Any, cotangents: tuple[Tensor, ...], needed: Any) -> tuple[Tensor, ...]:
        parts, start = [], 0
        for size in sizes:
            parts.append(cotangents[0][(slice(None),) * axis + (slice(start, start + size),)])
            start += size
        return tuple(parts)

    return custom_vjp(forward, backward)(*arrays)
