# SPDX-License-Identifier: Apache-2.0
"""From tokens to rows sorted by expert, and back: the two ends of the way of a token.

A token that goes to ``K`` experts becomes ``K`` rows. Both ways are gathers whose backward is a gather too, followed
by a sum over the ``K`` rows of a token in float32: no scatter, so results do not depend on the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.moe.counting import count_sorted
from hyperep.platform.protocol import Platform

__all__ = ["RoutePlan", "expand_tokens", "merge_rows", "plan_routes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutePlan:
    """Which row stands where after sorting by expert."""

    order: Any
    """int64 ``[T * K]``: sorted row ``i`` is choice ``order[i] % K`` of token ``order[i] // K``. Dropped ones last."""
    inverse: Any
    """int64 ``[T * K]``: where each choice went."""
    token: Any
    """int64 ``[N]``: the token of each row that is sent, ``order[:N] // K``."""
    tokens_per_expert: Any
    """int64 ``[E]``: rows sent to each expert."""
    dropped: int
    """``T * K - N``: choices that are not sent."""
    tokens: int
    """``T``."""
    top_k: int
    """``K``."""


def plan_routes(platform: Platform[Any], experts: Any, num_experts: int, *, all_sent: bool = True) -> RoutePlan:
    """Sort the choices *experts*, integers ``[T, K]``, by expert; equal ones stay in token order.

    Without *all_sent* some may be ``num_experts``, which is nobody; one copy to the host says how many are not sent.
    """
    xp = platform.xp
    tokens, top_k = experts.shape
    flat = xp.reshape(experts, (tokens * top_k,))
    dropped = 0
    if not all_sent:
        nobody = xp.astype(flat == num_experts, xp.int64)
        dropped = int(platform.to_host(xp.sum(nobody))[0])  # host sync here
    order = xp.argsort(flat, stable=True)
    inverse = xp.argsort(order, stable=True)
    by_choice = xp.broadcast_to(xp.reshape(platform.arange(tokens), (tokens, 1)), (tokens, top_k))
    token = xp.take(xp.reshape(by_choice, (tokens * top_k,)), order, axis=0)
    return RoutePlan(
        order=order,
        inverse=inverse,
        token=token[: tokens * top_k - dropped],
        tokens_per_expert=count_sorted(platform, xp.take(flat, order, axis=0), num_experts),
        dropped=dropped,
        tokens=tokens,
        top_k=top_k,
    )


def expand_tokens(platform: Platform[Any], x: Any, plan: RoutePlan) -> Any:
    """One row for each choice that is sent, sorted by expert: ``[T, D] -> [N, D]``."""
    by_token = platform.xp.reshape(plan.inverse, (plan.tokens, plan.top_k))

    def forward(x: Any) -> tuple[Any, tuple[Any, ...]]:
        return platform.xp.take(x, plan.token, axis=0), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        return (platform.sum_rows(_with_dropped(platform, cotangents[0], plan), by_token, plan.order),)

    return platform.custom_vjp(forward, backward)(x)


def merge_rows(platform: Platform[Any], rows: Any, scores: Any, plan: RoutePlan) -> Any:
    """Weight each row by its score and sum the rows of a token, in float32: ``[N, D], [T, K] -> [T, D]``.

    A dropped row counts as zero.
    """
    by_token = platform.xp.reshape(plan.inverse, (plan.tokens, plan.top_k))
    return platform.sum_rows(_with_dropped(platform, rows, plan), by_token, plan.order, scores)


def _with_dropped(platform: Platform[Any], rows: Any, plan: RoutePlan) -> Any:
    """*rows* ``[N, D]`` with zeros for the dropped ones at the end, where the plan has them: ``[T * K, D]``."""
    if not plan.dropped:
        return rows
    zeros = platform.xp.zeros((plan.dropped, *rows.shape[1:]), dtype=rows.dtype)
    return platform.xp.concat([rows, zeros], axis=0)
