# SPDX-License-Identifier: Apache-2.0
"""What depends on the device: one table.

The CPU has kernels for many functions of :mod:`mindspore.ops` that :mod:`mindspore.mint` has none for. On Ascend it is
the other way round: functions of ``mint`` are CANN's ``aclnn`` operators, and those of ``ops`` may be of its older
interface, with fewer types and fewer promises. And in the host's memory NumPy is faster than MindSpore's kernels where
tensors are large; see :mod:`hyperep_mindspore.host`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, ops

from hyperep.platform.base import PlatformBase
from hyperep_mindspore import host, host_order, host_rows
from hyperep_mindspore.grouped_operator import BY_CANN
from hyperep_mindspore.products import BY_MINDSPORE, BY_NUMPY, Products

__all__ = ["ASCEND", "CPU", "GPU", "Kernels", "kernels_of"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Functions of one device."""

    arange: Callable[[Any, Any, Any, ms.Type], Tensor]
    """From a number to before another one by steps, in a dtype; at least one."""
    full: Callable[[Sequence[int], Any, ms.Type], Tensor]
    """Of a shape, one value, in a dtype."""
    stack: Callable[[Sequence[Tensor], int], Tensor]
    """Along a new axis, of tensors of which none is empty. Differentiable."""
    argsort: Callable[[Tensor, int, bool], Tensor]
    """Of a tensor that is not empty, along an axis, descending or not; of equals the first stays first."""
    searchsorted: Callable[[Tensor, Tensor, bool], Tensor]
    """Places of numbers in an ascending tensor, neither of them empty; whether on the right of equals."""
    cumsum: Callable[[Tensor, int], Tensor]
    """Running sums along an axis, in the tensor's own dtype."""
    sum: Callable[[Tensor, tuple[int, ...], bool], Tensor]
    """Of a tensor that is not empty, over axes, keeping them or not, in the tensor's own dtype. Differentiable."""
    take: Callable[[Tensor, Tensor, int], Tensor]
    """Gather along an axis by one-dimensional indices, neither of them empty. Differentiable."""
    clone: Callable[[Tensor], Tensor]
    """A copy. Differentiable."""
    copied: Callable[[Tensor], Tensor]
    """A copy, contiguous. Not differentiable."""
    sum_rows: Callable[[PlatformBase[Tensor], Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """The platform's member of that name."""
    products: Products
    """What grouped products are made of."""


def _full(shape: Sequence[int], value: Any, dtype: ms.Type) -> Tensor:
    # There is no kernel that fills bfloat16.
    return ops.cast(ops.full(shape, value, dtype=ms.float32 if dtype == ms.bfloat16 else dtype), dtype)


def _searchsorted(x1: Tensor, x2: Tensor, right: bool) -> Tensor:
    if x1.dtype in (ms.float16, ms.bfloat16):
        x1, x2 = ops.cast(x1, ms.float32), ops.cast(x2, ms.float32)  # there is no kernel for them
    return ops.searchsorted(x1, x2, right=right)


def _sum(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    return ops.sum(x, axes, keepdim=keepdims)


def _sum_on_cpu(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    # The CPU's kernel adds up integers as float64, which is wrong past 2**53.
    return host_order.sum_integers(x, axes, keepdims) if x.dtype == ms.int64 else _sum(x, axes, keepdims)


CPU = Kernels(
    arange=host_order.arange,
    full=host_order.full,
    stack=lambda arrays, axis: ops.stack(list(arrays), axis),
    argsort=host_order.argsort,
    searchsorted=host_order.searchsorted,
    cumsum=lambda x, axis: ops.cumsum(x, axis),
    sum=_sum_on_cpu,
    take=host_rows.take,
    clone=lambda x: x.copy(),
    copied=host.copied,
    sum_rows=lambda platform, *arguments: host_rows.sum_rows(*arguments),
    products=BY_NUMPY,
)
GPU = replace(
    CPU,
    arange=lambda start, stop, step, dtype: ops.arange(start, stop, step, dtype=dtype),
    full=_full,
    argsort=lambda x, axis, descending: ops.cast(ops.argsort(x, axis, descending), ms.int64),
    searchsorted=_searchsorted,
    sum=_sum,
    take=lambda x, indices, axis: ops.gather(x, indices, axis),
    copied=lambda x: x.contiguous().copy(),
    sum_rows=PlatformBase.sum_rows,
    products=BY_MINDSPORE,
)
ASCEND = replace(
    GPU,
    # CANN's operators of today, which mint calls. Those of ops are of its older interface here (Range, Fill, Pack,
    # Sort, GatherV2, TensorMove), which hardware compiles anew for each size. Its Sort keeps equals in order only
    # where it is asked to, and is not asked; its Cumsum refuses int64.
    arange=lambda start, stop, step, dtype: mint.arange(start, stop, step, dtype=dtype),
    full=lambda shape, value, dtype: mint.full(tuple(shape), value, dtype=dtype),
    stack=lambda arrays, axis: mint.stack(list(arrays), axis),
    argsort=lambda x, axis, descending: ops.cast(mint.argsort(x, axis, descending, True), ms.int64),
    cumsum=lambda x, axis: mint.cumsum(x, axis),
    take=lambda x, indices, axis: mint.index_select(x, axis, indices),
    clone=mint.clone,
    copied=mint.clone,
    products=BY_CANN,
)


def kernels_of(device: str) -> Kernels:
    """The functions for ``"cpu"``, ``"ascend"`` or ``"gpu"``."""
    return {"cpu": CPU, "gpu": GPU, "ascend": ASCEND}[device]
