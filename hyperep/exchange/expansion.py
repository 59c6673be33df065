# SPDX-License-Identifier: Apache-2.0
"""From tokens to rows sorted by expert, and back: the two ends of the way of a row.

A token that goes to ``K`` experts becomes ``K`` rows, or fewer where some of its choices are nobody: the number of
experts, in place of the number of one. Both ways are gathers whose backward is a gather too, followed by a sum over the
rows of a token in float32: no scatter, so results do not depend on the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.exchange.counting import count_sorted
from hyperep.exchange.orders import argsort_below, inverse_order
from hyperep.platform.protocol import Platform

__all__ = ["RoutePlan", "expand_tokens", "merge_rows", "plan_routes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutePlan:
    """Which row stands where after sorting by expert."""

    entry: Any
    """int64 ``[N]``: row ``i`` is choice ``entry[i] % K`` of token ``entry[i] // K``."""
    place: Any
    """int64 ``[T, K]``: the row of each choice; ``N`` or more for nobody."""
    token: Any
    """int64 ``[N]``: the token of each row, ``entry // K``."""
    tokens_per_expert: Any
    """int64 ``[E]``: rows of each expert."""


def plan_routes(platform: Platform[Any], indices: Any, num_experts: int, rows: int | None = None) -> RoutePlan:
    """Sort choices by expert; those of one expert stay in token order.

    Args:
        platform: whose tensors these are.
        indices: integers ``[T, K]``, ``0 .. E``: the experts of each token, in any order, also one of them twice; or
            ``E`` for nobody.
        num_experts: ``E``.
        rows: ``N``, how many choices are not nobody. Left out, one copy to the host tells.
    """
    xp = platform.xp
    tokens, top_k = indices.shape
    flat = xp.reshape(indices, (tokens * top_k,))
    order = argsort_below(xp, flat, num_experts + 1)
    place = inverse_order(xp, order)
    by_expert = xp.take(flat, order, axis=0)
    tokens_per_expert = count_sorted(platform, by_expert, num_experts)
    if rows is None:
        rows = int(platform.to_host(xp.sum(tokens_per_expert))[0])  # host sync here
    by_choice = xp.broadcast_to(xp.reshape(platform.arange(tokens), (tokens, 1)), (tokens, top_k))
    entry = order[:rows]
    return RoutePlan(
        entry=entry,
        place=xp.reshape(place, (tokens, top_k)),
        token=xp.take(xp.reshape(by_choice, (tokens * top_k,)), entry, axis=0),
        tokens_per_expert=tokens_per_expert,
    )


def expand_tokens(platform: Platform[Any], x: Any, plan: RoutePlan) -> Any:
    """One row for each choice that is not nobody, sorted by expert: ``[T, D] -> [N, D]``."""

    def forward(x: Any) -> tuple[Any, tuple[Any, ...]]:
        return platform.xp.take(x, plan.token, axis=0), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        return (platform.sum_rows(cotangents[0], plan.place, plan.entry),)

    return platform.custom_vjp(forward, backward)(x)


def merge_rows(platform: Platform[Any], rows: Any, weights: Any, plan: RoutePlan) -> Any:
    """Weight each row and sum the rows of a token, in float32: ``[N, D], [T, K] -> [T, D]``; nobody adds nothing."""
    return platform.sum_rows(rows, plan.place, plan.entry, weights)
