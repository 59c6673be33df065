# SPDX-License-Identifier: Apache-2.0
"""From logits to scores, in ways that neither overflow nor lose the gradient."""

from __future__ import annotations

from typing import Any

from hyperep.platform.dtypes import dtype_named
from hyperep.platform.protocol import Platform

__all__ = ["at_least_float32", "logsumexp", "sigmoid", "softmax"]


def at_least_float32(platform: Platform[Any], x: Any) -> Any:
    """*x* in float32, unless it is float64; itself if it has that dtype already, where ``astype`` would copy."""
    wide = dtype_named(platform.xp, x.dtype, ("float32", "float64")) is not None
    return x if wide else platform.xp.astype(x, platform.xp.float32)


def softmax(platform: Platform[Any], x: Any) -> Any:
    """Softmax over the last dim; the maximum is subtracted, outside autodiff, so that nothing overflows."""
    xp = platform.xp
    e = xp.exp(x - platform.stop_gradient(xp.max(x, axis=-1, keepdims=True)))
    return e / xp.sum(e, axis=-1, keepdims=True)


def sigmoid(platform: Platform[Any], x: Any) -> Any:
    """``1 / (1 + exp(-x))``, exact to the last bits also where it is close to zero."""
    xp = platform.xp
    positive = x >= 0
    e = xp.exp(xp.where(positive, -x, x))  # at most 1
    return xp.where(positive, 1.0 / (1.0 + e), e / (1.0 + e))


def logsumexp(platform: Platform[Any], x: Any) -> Any:
    """``log(sum(exp(x)))`` over the last dim, which is dropped."""
    xp = platform.xp
    highest = platform.stop_gradient(xp.max(x, axis=-1, keepdims=True))
    return xp.log(xp.sum(xp.exp(x - highest), axis=-1)) + highest[..., 0]
