# SPDX-License-Identifier: Apache-2.0
"""Load figures, from the counts of a :class:`hyperep.moe.MoEStats`."""

from __future__ import annotations

from typing import Any

from hyperep.platform.protocol import Platform

__all__ = ["dropped_fraction", "load_imbalance"]


def load_imbalance(platform: Platform[Any], tokens_per_expert: Any) -> Any:
    """The largest count over the mean count: a float32 scalar, 1 when balanced, ``E`` at worst; 1 without tokens."""
    xp = platform.xp
    counts = xp.astype(tokens_per_expert, xp.float32)
    total = xp.sum(counts)
    one = xp.ones((), dtype=xp.float32)
    return xp.where(total > 0, xp.max(counts) * counts.shape[0] / xp.maximum(total, one), one)


def dropped_fraction(platform: Platform[Any], tokens_per_expert: Any, dropped_per_expert: Any) -> Any:
    """The share of choices that were dropped: a float32 scalar; 0 without tokens."""
    xp = platform.xp
    total = xp.astype(xp.sum(tokens_per_expert), xp.float32)
    dropped = xp.astype(xp.sum(dropped_per_expert), xp.float32)
    return dropped / xp.maximum(total, xp.ones((), dtype=xp.float32))
