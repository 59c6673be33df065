# SPDX-License-Identifier: Apache-2.0
"""The loss: cross entropy per byte, in nats."""

from __future__ import annotations

from typing import Any

from hyperep.platform.protocol import Platform

__all__ = ["cross_entropy"]


def cross_entropy(platform: Platform[Any], logits: Any, targets: Any, global_tokens: int) -> Any:
    """Sum over this rank's tokens, divided by the tokens of **all** ranks: a scalar.

    Summed over ranks this is the mean over the global batch, and so are its gradients, of experts and of all other
    parameters alike. (A mean over each rank's own tokens would need the experts' gradients divided by the ranks.)

    Args:
        platform: of the tensors.
        logits: float32 ``[T, V]``.
        targets: int64 ``[T]``.
        global_tokens: tokens of the whole batch.
    """
    xp = platform.xp
    shifted = logits - platform.stop_gradient(xp.max(logits, axis=1, keepdims=True))
    chosen = xp.take_along_axis(shifted, xp.reshape(targets, (-1, 1)), axis=1)
    logsumexp = xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    return xp.sum(logsumexp - chosen) / global_tokens
