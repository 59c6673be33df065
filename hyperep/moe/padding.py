# SPDX-License-Identifier: Apache-2.0
"""Padding: tokens that fill a batch up. They go to nobody, cost nothing and count nowhere."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hyperep.moe.router import Routing
from hyperep.platform.protocol import Platform

__all__ = ["blanked", "flat_mask", "routed_to_nobody"]


def flat_mask(platform: Platform[Any], mask: Any, x: Any) -> Any:
    """The mask ``[..., T]`` of the tokens ``[..., T, D]`` as bool ``[tokens]``; ``None`` where there is none.

    Raises:
        TypeError: *mask* is not a bool tensor of the platform.
        ValueError: its shape is not that of the tokens.
    """
    if mask is None:
        return None
    if not platform.is_tensor(mask) or mask.dtype != platform.xp.bool:
        raise TypeError(
            f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; give a bool tensor of the platform, true for each "
            "real token (attention_mask != 0)"
        )
    if tuple(mask.shape) != tuple(x.shape[:-1]):
        raise ValueError(
            f"mask of shape {list(mask.shape)} for tokens of shape {list(x.shape)}; it needs one entry a token, "
            f"{list(x.shape[:-1])}"
        )
    return platform.xp.reshape(mask, (math.prod(mask.shape),))


def blanked(platform: Platform[Any], tokens: Any, mask: Any) -> Any:
    """*tokens* ``[T, D]`` with zeros for padding, so that what stands there has no say, not even NaN."""
    xp = platform.xp
    return xp.where(xp.broadcast_to(xp.expand_dims(mask, axis=1), tokens.shape), tokens, xp.zeros_like(tokens))


def routed_to_nobody(platform: Platform[Any], routing: Routing, mask: Any) -> Routing:
    """The routing in which padding chooses the expert ``E``, which is nobody, with the score zero."""
    xp = platform.xp
    real = xp.broadcast_to(xp.expand_dims(mask, axis=1), routing.experts.shape)
    nobody = xp.full(routing.experts.shape, routing.probabilities.shape[1], dtype=routing.experts.dtype)
    return dataclasses.replace(
        routing,
        experts=xp.where(real, routing.experts, nobody),
        scores=xp.where(real, routing.scores, xp.zeros_like(routing.scores)),
        mask=mask,
    )
