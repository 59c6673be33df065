# SPDX-License-Identifier: Apache-2.0
"""``TopKRouter``: which experts a token goes to, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.moe.init import Seed, generator, uniform_fan_in
from hyperep.platform.protocol import Module, Platform

__all__ = ["Routing", "TopKRouter", "softmax"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """A router's decision for ``T`` tokens."""

    experts: Any
    """int64 ``[T, K]``: chosen experts, best first; of equal scores the lower index wins, on every platform."""
    scores: Any
    """float32 ``[T, K]``: the weight of each choice; differentiable."""
    probabilities: Any
    """float32 ``[T, E]``: the scores of all experts; differentiable."""


def TopKRouter(  # noqa: N802 (it makes modules, as a class would)
    platform: Platform[Any], dim: int, num_experts: int, top_k: int, *, normalize: bool = True, seed: Seed = 0
) -> Module:
    """Make a native module that routes tokens ``[T, D]`` by the softmax of a linear gate (arXiv:1701.06538).

    Args:
        platform: whose module to make.
        dim: ``D``.
        num_experts: ``E``.
        top_k: ``K``, experts per token.
        normalize: divide the chosen scores by their sum, as Mixtral does.
        seed: of the initial weight, or a generator.

    Returns:
        A module with a parameter ``gate`` ``[E, D]``, float32; it returns a :class:`Routing`. Scores are computed in
        float32 whatever the dtype of the tokens.

    Raises:
        ValueError: ``top_k`` is below one or above ``num_experts``.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
    xp = platform.xp

    def forward(m: Any, x: Any) -> Routing:
        logits = xp.matmul(xp.astype(x, xp.float32), xp.permute_dims(m.gate, (1, 0)))  # [T, E]
        probabilities = softmax(platform, logits)
        order = xp.argsort(platform.stop_gradient(probabilities), axis=1, descending=True, stable=True)
        experts = order[:, :top_k]
        scores = xp.take_along_axis(probabilities, experts, axis=1)
        if normalize:
            scores = scores / xp.sum(scores, axis=1, keepdims=True)
        return Routing(experts=experts, scores=scores, probabilities=probabilities)

    gate = platform.from_host(uniform_fan_in(generator(seed), (num_experts, dim)))
    description = f"dim={dim}, num_experts={num_experts}, top_k={top_k}, normalize={normalize}"
    return platform.make_module("TopKRouter", {"gate": gate}, forward, description=description)


def softmax(platform: Platform[Any], x: Any) -> Any:
    """Softmax over the last dim; the maximum is subtracted, outside autodiff, so that nothing overflows."""
    xp = platform.xp
    e = xp.exp(x - platform.stop_gradient(xp.max(x, axis=-1, keepdims=True)))
    return e / xp.sum(e, axis=-1, keepdims=True)
