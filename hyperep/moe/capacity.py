# SPDX-License-Identifier: Apache-2.0
"""Capacity: a limit to the rows that one rank sends to one expert, and which rows are dropped above it.

The limit is GShard's (arXiv:2006.16668): ``C = ceil(capacity_factor * T * K / E)``, of this rank's own ``T`` tokens,
padding not counted. A dropped row is not sent, contributes zero to its token and gets no gradient; the weights of the
token's other experts stay as they are.

=============== ============================================================================================
drop policy     which rows an expert keeps
=============== ============================================================================================
``probability`` those of the highest scores; of equal scores the first token
``position``    those of the first tokens
=============== ============================================================================================
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hyperep.exchange.counting import count_sorted
from hyperep.exchange.orders import argsort_below, inverse_order
from hyperep.platform.protocol import Platform

__all__ = ["expert_capacity", "kept_choices"]


def expert_capacity(
    platform: Platform[Any], tokens: int, mask: Any, top_k: int, num_experts: int, capacity_factor: float
) -> Any:
    """``C``, the most rows of one rank that one expert takes: an int, or with a mask an int64 tensor ``[1]``."""
    if mask is None:
        return int(_capacity(tokens, top_k, num_experts, capacity_factor))
    # How many tokens are real is known to the device alone. It looks their capacity up, and the host need not wait.
    table = platform.from_host(_capacity(np.arange(tokens + 1), top_k, num_experts, capacity_factor))
    real = platform.xp.sum(platform.xp.astype(mask, platform.xp.int64))
    return platform.xp.take(table, platform.xp.reshape(real, (1,)), axis=0)


def _capacity(tokens: Any, top_k: int, num_experts: int, capacity_factor: float) -> Any:
    return np.ceil(capacity_factor * tokens * top_k / num_experts).astype(np.int64)


def kept_choices(
    platform: Platform[Any],
    experts: Any,
    scores: Any,
    num_experts: int,
    capacity: Any,
    policy: Literal["probability", "position"],
) -> Any:
    """Which choices stay within the capacity.

    Args:
        platform: whose tensors these are.
        experts: integers ``[T, K]``; ``E`` is nobody.
        scores: float32 ``[T, K]``.
        num_experts: ``E``.
        capacity: ``C``, an int or an integer tensor ``[1]``.
        policy: which rows an expert keeps.

    Returns:
        bool ``[T, K]``; what is kept of the choices of nobody means nothing.
    """
    xp = platform.xp
    size = experts.shape[0] * experts.shape[1]
    flat = xp.reshape(experts, (size,))
    if policy == "probability":
        flat_scores = xp.reshape(platform.stop_gradient(scores), (size,))
        by_score = xp.argsort(flat_scores, descending=True, stable=True)
        # A stable sort by expert of what is sorted by score: by expert, and within one by score.
        order = xp.take(by_score, argsort_below(xp, xp.take(flat, by_score, axis=0), num_experts + 1), axis=0)
    else:
        order = argsort_below(xp, flat, num_experts + 1)
    by_expert = xp.take(flat, order, axis=0)
    counts = count_sorted(platform, by_expert, num_experts + 1)
    starts = xp.cumulative_sum(counts) - counts  # [E + 1] first row of each expert, and of nobody
    place = platform.arange(size) - xp.take(starts, by_expert, axis=0)  # among the rows of its expert
    inverse = inverse_order(xp, order)
    return xp.reshape(xp.take(place, inverse, axis=0) < capacity, experts.shape)
