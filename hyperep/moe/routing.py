# SPDX-License-Identifier: Apache-2.0
"""From tokens to rows sorted by expert, and back: the two ends of the way of a token.

A token that goes to ``K`` experts becomes ``K`` rows. Both ways are gathers whose backward is a gather too, followed
by a sum over the ``K`` rows of a token in float32: no scatter, so results do not depend on the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.platform.protocol import Platform

__all__ = ["RoutePlan", "expand_tokens", "merge_rows", "plan_routes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutePlan:
    """Which row stands where after sorting by expert."""

    order: Any
    """int64 ``[T * K]``: sorted row ``i`` is choice ``order[i] % K`` of token ``order[i] // K``."""
    inverse: Any
    """int64 ``[T * K]``: where each choice went."""
    token: Any
    """int64 ``[T * K]``: ``order // K``."""
    tokens_per_expert: Any
    """int64 ``[E]``."""
    tokens: int
    """``T``."""
    top_k: int
    """``K``."""


def plan_routes(platform: Platform[Any], experts: Any, num_experts: int) -> RoutePlan:
    """Sort the choices *experts*, integers ``[T, K]``, by expert; equal ones stay in token order."""
    xp = platform.xp
    tokens, top_k = experts.shape
    flat = xp.reshape(experts, (tokens * top_k,))
    order = xp.argsort(flat, stable=True)
    inverse = xp.argsort(order, stable=True)
    by_choice = xp.broadcast_to(xp.reshape(platform.arange(tokens), (tokens, 1)), (tokens, top_k))
    bounds = xp.searchsorted(xp.take(flat, order, axis=0), platform.arange(num_experts + 1, dtype=flat.dtype))
    return RoutePlan(
        order=order,
        inverse=inverse,
        token=xp.take(xp.reshape(by_choice, (tokens * top_k,)), order, axis=0),
        tokens_per_expert=xp.astype(bounds[1:] - bounds[:-1], xp.int64),
        tokens=tokens,
        top_k=top_k,
    )


def expand_tokens(platform: Platform[Any], x: Any, plan: RoutePlan) -> Any:
    """One row for each choice, sorted by expert: ``[T, D] -> [T * K, D]``."""
    by_token = platform.xp.reshape(plan.inverse, (plan.tokens, plan.top_k))

    def forward(x: Any) -> tuple[Any, tuple[Any, ...]]:
        return platform.xp.take(x, plan.token, axis=0), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        return (platform.sum_rows(cotangents[0], by_token, plan.order),)

    return platform.custom_vjp(forward, backward)(x)


def merge_rows(platform: Platform[Any], rows: Any, scores: Any, plan: RoutePlan) -> Any:
    """Weight each row by its score and sum the rows of a token, in float32: ``[T * K, D], [T, K] -> [T, D]``."""
    by_token = platform.xp.reshape(plan.inverse, (plan.tokens, plan.top_k))
    return platform.sum_rows(rows, by_token, plan.order, scores)
