# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and the device."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

__all__ = ["contiguous", "from_host", "to_host"]

_INTEGERS = (ms.bool_, ms.uint8, ms.int8, ms.int16, ms.int32, ms.int64)
_FLOATS = (ms.bfloat16, ms.float16, ms.float32)


def from_host(array: np.ndarray) -> Tensor:
    """Copy *array* to the device; the host may change the array afterwards."""
    if array.dtype.name == "bfloat16":
        return ops.cast(Tensor(array.astype(np.float32)), ms.bfloat16)
    return Tensor(np.array(array, order="C"))


def contiguous(x: Tensor) -> Tensor:
    """*x*, or a copy of it whose elements lie in the order of its dims."""
    return x if x.is_contiguous() else x.contiguous()


def to_host(tensors: Sequence[Tensor], device: str) -> tuple[np.ndarray, ...]:
    """Copy *tensors* to the host; bfloat16 becomes float32.

    From a device with a memory of its own, integers travel together as int64 and floats as float32, which is exact
    both times: one transfer, or two where both kinds are asked for.
    """
    if device == "cpu" or len(tensors) < 2:
        return tuple(_copy(t) for t in tensors)
    results: list[np.ndarray | None] = [None] * len(tensors)
    for kinds, carrier in ((_INTEGERS, ms.int64), (_FLOATS, ms.float32)):
        chosen = [i for i, t in enumerate(tensors) if t.dtype in kinds and t.size]
        if chosen:
            flat = [ops.cast(tensors[i].reshape((-1,)), carrier) for i in chosen]
            data, start = ops.cat(flat).asnumpy(), 0  # host sync here
            for i in chosen:
                stop = start + tensors[i].size
                results[i] = data[start:stop].reshape(tensors[i].shape).astype(_numpy_dtype(tensors[i]))
                start = stop
    return tuple(_copy(t) if r is None else r for t, r in zip(tensors, results, strict=True))


def _copy(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.asnumpy(), dtype=_numpy_dtype(tensor), order="C")


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return np.dtype(ms.dtype_to_nptype(ms.float32 if tensor.dtype == ms.bfloat16 else tensor.dtype))
