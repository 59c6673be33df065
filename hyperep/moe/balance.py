# SPDX-License-Identifier: Apache-2.0
"""Balance without an auxiliary loss: a bias per expert that follows the load (arXiv:2408.15664; arXiv:2412.19437)."""

from __future__ import annotations

from typing import Any

from hyperep.platform.protocol import Group, Module, Platform

__all__ = ["stepped_expert_bias", "update_expert_bias"]


def stepped_expert_bias(platform: Platform[Any], bias: Any, tokens_per_expert: Any, rate: float) -> Any:
    """The bias after one step: up by *rate* for experts below the mean load, down for those above it.

    Args:
        platform: whose tensors these are.
        bias: float32 ``[E]``.
        tokens_per_expert: int64 ``[E]``, of the whole batch on all ranks.
        rate: the step, ``gamma`` in the literature.

    Returns:
        float32 ``[E]``.
    """
    xp = platform.xp
    # Below the mean, in integers: count < total / E is the same as E * count < total.
    missing = xp.sum(tokens_per_expert) - tokens_per_expert.shape[0] * tokens_per_expert
    sign = xp.astype(missing > 0, xp.float32) - xp.astype(missing < 0, xp.float32)
    return bias + rate * sign


def update_expert_bias(
    platform: Platform[Any], moe: Module, tokens_per_expert: Any, rate: float, *, group: Group = None
) -> None:
    """Move the expert bias of one layer by one step, in place; once per optimizer step. Collective over *group*.

    Args:
        platform: whose module it is.
        moe: a layer with ``RouterConfig(expert_bias=True)``, or its router.
        tokens_per_expert: int64 ``[E]``: this rank's counts of the whole step, from ``MoEStats``; those of several
            micro-batches are added up by the caller.
        rate: the step.
        group: the ranks whose counts are summed; ``None`` is the world. Ranks that hold the same tokens multiply all
            counts alike, which changes no sign.

    Raises:
        ValueError: *moe* has no expert bias, or several.
    """
    found = {path: buffer for path, buffer in platform.buffers(moe).items() if path.split(".")[-1] == "expert_bias"}
    if len(found) != 1:
        raise ValueError(
            f"update_expert_bias found {len(found)} buffers named 'expert_bias' ({', '.join(found) or 'none'}); give "
            "one layer that was made with RouterConfig(expert_bias=True)"
        )
    (buffer,) = found.values()
    counts = platform.all_reduce(tokens_per_expert, group)
    platform.assign(buffer, stepped_expert_bias(platform, platform.local(buffer), counts, rate))
