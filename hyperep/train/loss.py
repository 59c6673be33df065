# SPDX-License-Identifier: Apache-2.0
"""The two losses: cross entropy per byte, in nats, and what keeps the experts' load even."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperep.moe import Routing, sequence_load_balancing_loss
from hyperep.platform.protocol import Platform

__all__ = ["cross_entropy", "imbalance_loss"]


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


def imbalance_loss(platform: Platform[Any], routings: Sequence[Routing], sequences: int, global_sequences: int) -> Any:
    """The load-balancing loss of each sequence (arXiv:2412.19437, 2.1.2), the mean over layers: a scalar.

    Summed over this rank's *sequences* and divided by those of all ranks, as the cross entropy is. A loss of each
    sequence, and not of each rank's batch, because it does not depend on how many ranks share the batch.
    """
    total: Any = 0.0
    for routing in routings:
        total = total + sequence_load_balancing_loss(platform, routing, sequences)
    return total * (sequences / (global_sequences * len(routings)))
