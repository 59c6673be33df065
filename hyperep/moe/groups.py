# SPDX-License-Identifier: Apache-2.0
"""Group-limited routing: a token chooses from its best groups of experts only (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

Where a group is what one node holds, no token travels to more than ``top_groups`` nodes.
"""

from __future__ import annotations

from typing import Any

from hyperep.exchange.orders import inverse_order
from hyperep.platform.protocol import Platform

__all__ = ["best_groups_only"]

_EXPERTS_THAT_SPEAK_FOR_A_GROUP = 2


def best_groups_only(platform: Platform[Any], scores: Any, num_groups: int, top_groups: int) -> Any:
    """*scores* ``[T, E]`` with those outside each token's best groups set to minus infinity; not differentiable.

    A group's score is the sum of its two best experts' scores. Of equal groups the lower index wins.
    """
    xp = platform.xp
    tokens, experts = scores.shape
    members = experts // num_groups
    grouped = xp.reshape(scores, (tokens, num_groups, members))  # [T, G, E / G]
    best = xp.argsort(grouped, axis=2, descending=True, stable=True)[:, :, :_EXPERTS_THAT_SPEAK_FOR_A_GROUP]
    group_scores = xp.sum(xp.take_along_axis(grouped, best, axis=2), axis=2)  # [T, G]
    # The inverse of an order is the place of each group in it; no scatter is needed to mark the best.
    place = inverse_order(xp, xp.argsort(group_scores, axis=1, descending=True, stable=True), axis=1)
    kept = xp.broadcast_to(xp.expand_dims(place < top_groups, axis=2), grouped.shape)
    return xp.reshape(xp.where(kept, grouped, xp.full(grouped.shape, float("-inf"), dtype=scores.dtype)), scores.shape)
