# SPDX-License-Identifier: Apache-2.0
"""``MoE``: the layer around router and experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hyperep.exchange.counting import count_values
from hyperep.moe.capacity import expert_capacity, kept_choices
from hyperep.moe.config import MoEConfig, RouterConfig
from hyperep.moe.experts import GroupedExperts
from hyperep.moe.feed_forward import FeedForward
from hyperep.moe.init import Seed, generator
from hyperep.moe.padding import blanked, flat_mask, routed_to_nobody
from hyperep.moe.router import Routing, build_router
from hyperep.platform.protocol import Module, Platform

__all__ = ["MoE", "MoEStats", "build_moe", "describe", "moe_forward"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MoEStats:
    """What a call of the layer knows beside its output. A value, so that recompute counts nothing twice."""

    tokens_per_expert: Any
    """int64 ``[E]``: how often this rank's real tokens chose each expert; dropped choices count too."""
    dropped_per_expert: Any
    """int64 ``[E]``: how many of these were over capacity; all zero in a dropless layer."""
    routing: Routing
    """What the auxiliary losses are functions of."""
    sequences: int
    """How many sequences of equal length the tokens form: the product of the leading dims of ``[..., T, D]``."""


def MoE(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, hidden_dim: int, num_experts: int, top_k: int, *, seed: Seed | None = None
) -> Module:
    """Make a native mixture-of-experts layer with softmax scores, and without shared experts or capacity.

    The scores of a token's experts are normalised to sum to one, except for ``top_k=1``; see :class:`RouterConfig`.

    Args:
        platform: whose module to make.
        dim: ``D``.
        hidden_dim: ``H`` of each expert.
        num_experts: ``E``.
        top_k: ``K``, experts per token.
        seed: of the initial weights; see :mod:`hyperep.moe.init`. Left out, each module gets others.

    Returns:
        The module that :func:`build_moe` makes; that one takes all other settings.
    """
    router = RouterConfig(num_experts=num_experts, top_k=top_k)
    return build_moe(platform, MoEConfig(dim=dim, hidden_dim=hidden_dim, router=router), seed=seed)


def build_moe(platform: Platform[Any], config: MoEConfig, *, seed: Seed | None = None) -> Module:
    """Make the native mixture-of-experts layer of a configuration: route, drop what is over capacity, experts.

    Args:
        platform: whose module to make.
        config: the layer's settings.
        seed: of the initial weights; see :mod:`hyperep.moe.init`. Left out, each module gets others.

    Returns:
        A module with children ``router``, ``experts`` and perhaps ``shared_experts``, called with ``[..., D]``; it
        returns the same shape, or with ``with_stats=True`` a pair of that and a :class:`MoEStats`. Shard its experts by
        applying a parallel style to the child ``experts``; nothing else changes. The scores weight what the experts
        return, in float32. ``mask=``, bool and of the shape of the tokens without ``D``, is true for real tokens and
        false for padding, which goes to nobody, counts nowhere and is zero in the output. Where
        nothing is sharded, a mask or a capacity costs a copy to the host: how many choices are left.
    """
    rng = generator(platform, seed)
    num_experts = config.router.num_experts
    children = {
        "router": build_router(platform, config.dim, config.router, seed=rng),
        "experts": GroupedExperts(platform, config.dim, config.hidden_dim, num_experts, seed=rng),
    }
    if config.num_shared_experts:
        hidden_dim = config.num_shared_experts * config.hidden_dim
        children["shared_experts"] = FeedForward(platform, config.dim, hidden_dim, seed=rng)

    def forward(m: Any, x: Any, *, mask: Any = None, with_stats: bool = False) -> Any:
        return moe_forward(platform, config, m, x, mask=mask, with_stats=with_stats)

    return platform.make_module("MoE", {}, forward, children=children, description=describe(config))


def describe(config: MoEConfig) -> str:
    """What a layer of this configuration prints between its brackets."""
    limit = "dropless" if config.capacity_factor is None else f"capacity_factor={config.capacity_factor}"
    return f"top_k={config.router.top_k}, {limit}, num_shared_experts={config.num_shared_experts}"


def moe_forward(
    platform: Platform[Any], config: MoEConfig, m: Any, x: Any, *, mask: Any = None, with_stats: bool = False
) -> Any:
    """What a layer ``m`` with children ``router``, ``experts`` and perhaps ``shared_experts`` makes of ``[..., D]``."""
    xp = platform.xp
    num_experts = config.router.num_experts
    tokens = xp.reshape(x, (math.prod(x.shape[:-1]), config.dim))  # [T, D]
    real = flat_mask(platform, mask, x)  # [T]
    if real is not None:
        tokens = blanked(platform, tokens, real)
    routing = m.router(tokens)
    if real is not None:
        routing = routed_to_nobody(platform, routing, real)
    choices = _kept(platform, routing, config)
    # Where every choice is somebody's, the experts need not ask the device how many are.
    all_somebody = config.capacity_factor is None and real is None
    rows = math.prod(choices.shape) if all_somebody else None
    shared = {"meanwhile": m.shared_experts} if config.num_shared_experts else {}
    out = m.experts(tokens, choices, routing.scores, rows=rows, **shared)  # [T, D]
    out = xp.reshape(out, x.shape)
    return (out, _stats(platform, routing, choices, num_experts, math.prod(x.shape[:-2]))) if with_stats else out


def _kept(platform: Platform[Any], routing: Routing, config: MoEConfig) -> Any:
    """The choices that are computed, int64 ``[T, K]``: those over capacity are nobody, the number of experts."""
    num_experts, experts = config.router.num_experts, routing.experts
    if config.capacity_factor is None:
        return experts
    tokens, top_k = experts.shape
    capacity = expert_capacity(platform, tokens, routing.mask, top_k, num_experts, config.capacity_factor)
    kept = kept_choices(platform, experts, routing.scores, num_experts, capacity, config.drop_policy)
    return platform.xp.where(kept, experts, platform.xp.full(experts.shape, num_experts, dtype=experts.dtype))


def _stats(platform: Platform[Any], routing: Routing, choices: Any, num_experts: int, sequences: int) -> MoEStats:
    chosen, kept = (
        count_values(platform, platform.xp.reshape(x, (math.prod(x.shape),)), num_experts)
        for x in (routing.experts, choices)
    )
    return MoEStats(tokens_per_expert=chosen, dropped_per_expert=chosen - kept, routing=routing, sequences=sequences)
