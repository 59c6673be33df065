# SPDX-License-Identifier: Apache-2.0
"""``TopKRouter``: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.moe.config import RouterConfig
from hyperep.moe.groups import best_groups_only
from hyperep.moe.init import Seed, generator, uniform_fan_in
from hyperep.moe.scores import at_least_float32, sigmoid, softmax
from hyperep.platform.protocol import Module, Platform

__all__ = ["Routing", "TopKRouter", "build_router", "route", "router_forward"]

_SMALLEST_SUM = 1e-20
"""Added to the sum of the chosen scores: all of them may be zero where a sigmoid underflows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """A router's decision for ``T`` tokens."""

    experts: Any
    """int64 ``[T, K]``: chosen experts, best first; of equal scores the lower index wins, on every platform. ``E`` is
    nobody: what padding chooses."""
    scores: Any
    """float32 ``[T, K]``: the weight of each choice; differentiable."""
    probabilities: Any
    """float32 ``[T, E]``: the scores of all experts, without bias and scale; differentiable."""
    logits: Any
    """float32 ``[T, E]``: what the gate computed; differentiable."""
    mask: Any = None
    """bool ``[T]``: which tokens are real and not padding; ``None`` where all are."""


def TopKRouter(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, num_experts: int, top_k: int, *, seed: Seed | None = None, **options: Any
) -> Module:
    """Make a native module that routes tokens ``[T, D]`` by a linear gate (arXiv:1701.06538).

    Args:
        platform: whose module to make.
        dim: ``D``.
        num_experts: ``E``.
        top_k: ``K``, experts per token.
        seed: of the initial weight; see :mod:`hyperep.moe.init`. Left out, each module gets another.
        options: the other fields of :class:`hyperep.moe.RouterConfig`.

    Returns:
        A module with a parameter ``gate`` ``[E, D]``, float32, and with ``expert_bias=True`` a buffer ``expert_bias``
        ``[E]``, zero at first. It returns a :class:`Routing`. Scores are computed in float32 whatever the dtype of the
        tokens and of the gate; in float64 if the gate is.

    Raises:
        ValueError: an option is out of its range.
    """
    return build_router(platform, dim, RouterConfig(num_experts=num_experts, top_k=top_k, **options), seed=seed)


def build_router(platform: Platform[Any], dim: int, config: RouterConfig, *, seed: Seed | None = None) -> Module:
    """Make the router of a configuration; see :func:`TopKRouter`."""

    def forward(m: Any, x: Any) -> Routing:
        return router_forward(platform, config, m, x)

    gate = platform.from_host(uniform_fan_in(generator(platform, seed), (config.num_experts, dim)))
    zeros = platform.from_host(np.zeros(config.num_experts, np.float32))
    buffers = {"expert_bias": zeros} if config.expert_bias else {}
    changed = ", ".join(
        f"{name}={getattr(config, name)!r}" for name in RouterConfig.__dataclass_fields__ if name != "num_experts"
    )
    description = f"dim={dim}, num_experts={config.num_experts}, {changed}"
    return platform.make_module("TopKRouter", {"gate": gate}, forward, buffers=buffers, description=description)


def router_forward(platform: Platform[Any], config: RouterConfig, m: Any, x: Any) -> Routing:
    """What a router ``m`` with ``gate`` ``[E, D]`` and perhaps ``expert_bias`` ``[E]`` makes of tokens ``[T, D]``."""
    xp = platform.xp
    gate = at_least_float32(platform, m.gate)
    tokens = x if x.dtype == gate.dtype else xp.astype(x, gate.dtype)
    logits = xp.matmul(tokens, xp.permute_dims(gate, (1, 0)))  # [T, E]
    return route(platform, logits, config, at_least_float32(platform, m.expert_bias) if config.expert_bias else None)


def route(platform: Platform[Any], logits: Any, config: RouterConfig, expert_bias: Any = None) -> Routing:
    """Choose experts from float32 *logits* ``[T, E]``.

    The bias, float32 ``[E]``, has a say in which experts are chosen, groups included, and none in their weights.
    """
    xp = platform.xp
    probabilities = (softmax if config.score_function == "softmax" else sigmoid)(platform, logits)
    selection = platform.stop_gradient(probabilities)
    if expert_bias is not None:
        selection = selection + xp.expand_dims(expert_bias, axis=0)
    if config.top_groups < config.num_groups:
        selection = best_groups_only(platform, selection, config.num_groups, config.top_groups)
    experts = xp.argsort(selection, axis=1, descending=True, stable=True)[:, : config.top_k]
    scores = xp.take_along_axis(probabilities, experts, axis=1)
    if config.normalize:
        scores = scores / (xp.sum(scores, axis=1, keepdims=True) + _SMALLEST_SUM)
    if config.route_scale != 1.0:
        scores = scores * config.route_scale
    return Routing(experts=experts, scores=scores, probabilities=probabilities, logits=logits)
