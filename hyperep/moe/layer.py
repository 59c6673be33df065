# SPDX-License-Identifier: Apache-2.0
"""``MoE``: the layer around router and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.moe.experts import GroupedExperts
from hyperep.moe.init import Seed, generator
from hyperep.moe.router import Routing, TopKRouter
from hyperep.moe.routing import expand_tokens, merge_rows, plan_routes
from hyperep.platform.protocol import Module, Platform

__all__ = ["MoE", "MoEStats"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MoEStats:
    """What a call of the layer knows beside its output. A value, so that recompute counts nothing twice."""

    tokens_per_expert: Any
    """int64 ``[E]``: rows of this rank for each expert."""
    routing: Routing


def MoE(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, hidden_dim: int, num_experts: int, top_k: int, *, seed: Seed = 0
) -> Module:
    """Make a native mixture-of-experts layer: route, expand, experts, weight, sum.

    Args:
        platform: whose module to make.
        dim: ``D``.
        hidden_dim: ``H`` of each expert.
        num_experts: ``E``.
        top_k: ``K``, experts per token.
        seed: of the initial weights, or a generator.

    Returns:
        A module with children ``router`` and ``experts``, called with ``[..., D]``; it returns the same shape, or with
        ``with_stats=True`` a pair of that and a :class:`MoEStats`. Shard its experts by applying a parallel style to
        the child ``experts``; nothing else changes.
    """
    rng = generator(seed)
    children = {
        "router": TopKRouter(platform, dim, num_experts, top_k, seed=rng),
        "experts": GroupedExperts(platform, dim, hidden_dim, num_experts, seed=rng),
    }
    xp = platform.xp

    def forward(m: Any, x: Any, *, with_stats: bool = False) -> Any:
        tokens = xp.reshape(x, (-1, dim))  # [T, D]
        routing = m.router(tokens)
        plan = plan_routes(platform, routing.experts, num_experts)
        rows = expand_tokens(platform, tokens, plan)  # [T * K, D]
        rows = m.experts(rows, plan.tokens_per_expert)
        out = xp.reshape(merge_rows(platform, rows, routing.scores, plan), x.shape)
        return (out, MoEStats(tokens_per_expert=plan.tokens_per_expert, routing=routing)) if with_stats else out

    return platform.make_module("MoE", {}, forward, children=children, description=f"top_k={top_k}")
