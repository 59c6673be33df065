# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: functions of a routing, to be added to the training loss.

With ``c_i`` the number of choices of expert ``i``, ``p_ti`` the score of expert ``i`` for token ``t``, scaled to sum to
one over the experts, and all sums over the tokens of one scope::

    f_i = E c_i / (K T)          1 for all experts when the load is balanced; carries no gradient
    P_i = sum_t p_ti / T
    loss = sum_i f_i P_i         1 when the load is balanced, E when everything goes to one expert (K = 1)

========================================== ==================================================== ======================
function                                   scope                                                where it is from
========================================== ==================================================== ======================
:func:`load_balancing_loss`                this rank's tokens                                   arXiv:2101.03961, eq. 4
:func:`sequence_load_balancing_loss`       each sequence; the mean over sequences               arXiv:2412.19437, 2.1.2
:func:`global_load_balancing_loss`         the tokens of all ranks of a mesh                    arXiv:2501.11873
========================================== ==================================================== ======================

The loss that Hugging Face transformers computes for Mixtral and Qwen3-MoE does not divide by ``K``: it is ``K`` times
:func:`load_balancing_loss`.
"""

from __future__ import annotations

from typing import Any

from hyperep.mesh import DeviceMesh
from hyperep.moe.config import LossCoefficients
from hyperep.moe.counting import count_values
from hyperep.moe.router import Routing
from hyperep.moe.scores import logsumexp
from hyperep.platform.protocol import Platform

__all__ = [
    "auxiliary_loss",
    "global_load_balancing_loss",
    "load_balancing_loss",
    "router_z_loss",
    "sequence_load_balancing_loss",
]


def load_balancing_loss(platform: Platform[Any], routing: Routing) -> Any:
    """The load-balancing loss of this rank's tokens: a float32 scalar; zero without tokens."""
    return sequence_load_balancing_loss(platform, routing, 1)


def sequence_load_balancing_loss(platform: Platform[Any], routing: Routing, sequences: int) -> Any:
    """The mean over *sequences* of the load-balancing loss of each: a float32 scalar; zero without tokens.

    The tokens are *sequences* runs of equal length, one after another.

    Raises:
        ValueError: the number of tokens is not divisible by *sequences*.
    """
    xp = platform.xp
    tokens, top_k = routing.experts.shape
    num_experts = routing.probabilities.shape[1]
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens do not form {sequences} sequences of equal length; give a divisor")
    length = tokens // sequences
    # Experts of different sequences are counted apart by numbering them apart.
    first = xp.reshape(platform.arange(sequences, dtype=routing.experts.dtype) * num_experts, (sequences, 1))
    numbered = xp.reshape(xp.reshape(routing.experts, (sequences, length * top_k)) + first, (tokens * top_k,))
    counts = xp.reshape(count_values(platform, numbered, sequences * num_experts), (sequences, num_experts))
    by_sequence = xp.reshape(_shares(platform, routing), (sequences, length, num_experts))
    total = xp.sum(xp.astype(counts, xp.float32) * xp.sum(by_sequence, axis=1))
    return total * (num_experts / (sequences * top_k * max(length, 1) ** 2))


def global_load_balancing_loss(platform: Platform[Any], routing: Routing, mesh: DeviceMesh) -> Any:
    """This rank's part of the load-balancing loss of all tokens of a mesh: a float32 scalar. Collective.

    The mean of the parts over the ranks of the mesh is the loss of the global batch, exactly, also where ranks have
    different numbers of tokens. Counts are summed over the ranks, outside autodiff; scores stay where they are.

    Args:
        platform: whose tensors these are.
        routing: of this rank.
        mesh: 1-D mesh of the ranks that have different tokens.
    """
    xp = platform.xp
    tokens, top_k = routing.experts.shape
    num_experts = routing.probabilities.shape[1]
    counts = count_values(platform, xp.reshape(routing.experts, (tokens * top_k,)), num_experts)
    counts = xp.astype(platform.all_reduce(counts, mesh.get_group()), xp.float32)
    choices = xp.maximum(xp.sum(counts), xp.ones((), dtype=xp.float32))  # K times the tokens of all ranks
    weighted = xp.sum(counts * xp.sum(_shares(platform, routing), axis=0))
    return weighted * (num_experts * top_k * mesh.size()) / (choices * choices)


def router_z_loss(platform: Platform[Any], routing: Routing) -> Any:
    """The mean of ``logsumexp(logits)**2`` over tokens (ST-MoE, arXiv:2202.08906, eq. 5): a float32 scalar."""
    log_sums = logsumexp(platform, routing.logits)  # [T]
    return platform.xp.sum(log_sums * log_sums) * (1.0 / max(routing.logits.shape[0], 1))


def auxiliary_loss(
    platform: Platform[Any],
    routing: Routing,
    coefficients: LossCoefficients,
    *,
    sequences: int = 1,
    mesh: DeviceMesh | None = None,
) -> Any:
    """The sum of the losses that have a coefficient above zero, each times its own: a float32 scalar.

    Args:
        platform: whose tensors these are.
        routing: of this rank.
        coefficients: one for each loss.
        sequences: how many sequences the tokens form; ``MoEStats`` knows.
        mesh: for the global loss, the 1-D mesh of the ranks that have different tokens.

    Raises:
        ValueError: there is a coefficient for the global loss but no mesh.
    """
    total = platform.xp.zeros((), dtype=platform.xp.float32)
    if coefficients.batch:
        total = total + coefficients.batch * load_balancing_loss(platform, routing)
    if coefficients.sequence:
        total = total + coefficients.sequence * sequence_load_balancing_loss(platform, routing, sequences)
    if coefficients.global_batch:
        if mesh is None:
            raise ValueError(
                f"global_batch={coefficients.global_batch}: the global loss needs the mesh of the ranks that have "
                "different tokens; pass mesh=, or use the coefficient batch instead"
            )
        total = total + coefficients.global_batch * global_load_balancing_loss(platform, routing, mesh)
    if coefficients.z:
        total = total + coefficients.z * router_z_loss(platform, routing)
    return total


def _shares(platform: Platform[Any], routing: Routing) -> Any:
    """The scores of all experts, scaled to sum to one for each token: ``[T, E]``."""
    total = platform.xp.sum(routing.probabilities, axis=1, keepdims=True)
    return routing.probabilities / (total + 1e-20)  # all may be zero where a sigmoid underflows
