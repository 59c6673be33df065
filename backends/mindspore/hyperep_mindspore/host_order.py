# SPDX-License-Identifier: Apache-2.0
"""Numbers, orders and searches by NumPy: what has no gradient; see :mod:`hyperep_mindspore.host`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from hyperep_mindspore.host import from_array, opened

__all__ = ["arange", "argsort", "full", "searchsorted", "sum_integers"]


def arange(start: Any, stop: Any, step: Any, dtype: ms.Type) -> Tensor:
    """Numbers from *start* to before *stop*."""
    wide = ms.float32 if dtype == ms.bfloat16 else dtype
    return from_array(np.arange(start, stop, step, dtype=ms.dtype_to_nptype(wide)), dtype)


def full(shape: Sequence[int], value: Any, dtype: ms.Type) -> Tensor:
    """One value everywhere."""
    wide = ms.float32 if dtype == ms.bfloat16 else dtype
    return from_array(np.full(tuple(shape), value, dtype=ms.dtype_to_nptype(wide)), dtype)


def argsort(x: Tensor, axis: int, descending: bool) -> Tensor:
    """Where each place of the order comes from, int64; of equals the first stays first, also when descending."""
    keys = opened(x)
    if descending:
        # Neither overflows: an order of integers turns round with their bits.
        keys = ~keys if keys.dtype.kind in "bui" else -keys
    return from_array(np.argsort(keys, axis=axis, kind="stable"), ms.int64)


def searchsorted(x1: Tensor, x2: Tensor, right: bool) -> Tensor:
    """How many of the ascending *x1* are less than each of *x2*, or not greater; int64."""
    found = np.searchsorted(opened(x1), opened(x2), side="right" if right else "left")
    return from_array(np.asarray(found, dtype=np.int64), ms.int64)


def sum_integers(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """The sum over *axes*, exact. Nobody differentiates it."""
    return from_array(np.asarray(opened(x).sum(axis=axes, keepdims=keepdims)), x.dtype)
