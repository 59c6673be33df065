# SPDX-License-Identifier: Apache-2.0
"""Counting integers without a scatter, so that the same input gives the same bits everywhere."""

from __future__ import annotations

from typing import Any

from hyperep.exchange.orders import argsort_below
from hyperep.platform.protocol import Platform

__all__ = ["count_sorted", "count_values"]


def count_sorted(platform: Platform[Any], values: Any, size: int) -> Any:
    """How often each of ``0 .. size - 1`` occurs in the ascending integers *values* ``[N]``: int64 ``[size]``."""
    xp = platform.xp
    bounds = xp.searchsorted(values, platform.arange(size + 1, dtype=values.dtype))
    return xp.astype(bounds[1:] - bounds[:-1], xp.int64)


def count_values(platform: Platform[Any], values: Any, size: int) -> Any:
    """How often each of ``0 .. size - 1`` occurs in the integers *values* ``[N]``: int64 ``[size]``."""
    xp = platform.xp
    return count_sorted(platform, xp.take(values, argsort_below(xp, values, size), axis=0), size)
