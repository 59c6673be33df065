# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: functions of a routing, to be added to the training loss.

With ``c_i`` the number of choices of expert ``i``, ``p_ti`` the score of expert ``i`` for token ``t``, scaled to sum to
one over the experts, and all sums over the real tokens of one scope, padding left out::

    f_i = E c_i / (K T)          1 for all experts when the load is balanced; carries no gradient
    P_i = sum_t p_ti / T
    loss = sum_i f_i P_i         1 when the load is balanced, E when everything goes to one expert (K = 1)

========================================== ==================================================== ======================
function                                   scope                                                where it is from
========================================== ==================================================== ======================
:func:`load_balancing_loss`                this rank's tokens                                   arXiv:2101.03961, eq. 4
:func:`sequence_load_balancing_loss`       each sequence; the mean over those with real tokens  arXiv:2412.19437, 2.1.2
:func:`global_load_balancing_loss`         the tokens of all ranks of a mesh                    arXiv:2501.11873
========================================== ==================================================== ======================

The loss that Hugging Face transformers computes for Mixtral and Qwen3-MoE does not divide by ``K``: it is ``K`` times
:func:`load_balancing_loss`.
"""

from __future__ import annotations

from typing import Any

from hyperep.exchange.counting import count_values
from hyperep.mesh import DeviceMesh
from hyperep.moe.config import LossCoefficients
from hyperep.moe.router import Routing
from hyperep.moe.scores import logsumexp
from hyperep.platform.protocol import Platform
from hyperep.platform.selection import adopt_mesh

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

    The tokens are *sequences* runs of equal length, padding included, one after another. A sequence that is nothing but
    padding is none.

    Raises:
        ValueError: the number of tokens is not divisible by *sequences*.
    """
    xp = platform.xp
    tokens, top_k = routing.experts.shape
    num_experts = routing.probabilities.shape[1]
    sequences = sequences if tokens else max(sequences, 1)  # a rank may have no sequence at all
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens do not form {sequences} sequences of equal length; give a divisor")
    length = tokens // sequences
    # Experts of different sequences, and nobody, are counted apart by numbering them apart.
    numbers = num_experts + 1
    first = xp.reshape(platform.arange(sequences, dtype=routing.experts.dtype) * numbers, (sequences, 1))
    numbered = xp.reshape(xp.reshape(routing.experts, (sequences, length * top_k)) + first, (tokens * top_k,))
    counts = xp.reshape(count_values(platform, numbered, sequences * numbers), (sequences, numbers))[:, :num_experts]
    by_sequence = xp.sum(xp.reshape(_shares(platform, routing), (sequences, length, num_experts)), axis=1)  # [S, E]
    weighted = xp.sum(xp.astype(counts, xp.float32) * by_sequence, axis=1)  # [S]
    real = _real_tokens(platform, routing, sequences)  # [S]
    one = xp.ones((), dtype=xp.float32)
    total = xp.sum(weighted / xp.maximum(real, one) / xp.maximum(real, one))
    return total * (num_experts / top_k) / xp.maximum(xp.sum(xp.astype(real > 0, xp.float32)), one)


def global_load_balancing_loss(platform: Platform[Any], routing: Routing, mesh: DeviceMesh) -> Any:
    """This rank's part of the load-balancing loss of all tokens of a mesh: a float32 scalar. Collective.

    The mean of the parts over the ranks of the mesh is the loss of the global batch, exactly, also where ranks have
    different numbers of tokens. Counts are summed over the ranks, outside autodiff; scores stay where they are.

    Args:
        platform: whose tensors these are.
        routing: of this rank.
        mesh: 1-D mesh of the ranks that have different tokens, or a native one.

    Raises:
        TypeError: *mesh* is none.
    """
    xp, mesh = platform.xp, adopt_mesh(mesh)
    tokens, top_k = routing.experts.shape
    num_experts = routing.probabilities.shape[1]
    counts = count_values(platform, xp.reshape(routing.experts, (tokens * top_k,)), num_experts)
    counts = xp.astype(platform.all_reduce(counts, mesh.get_group()), xp.float32)
    choices = xp.maximum(xp.sum(counts), xp.ones((), dtype=xp.float32))  # K times the tokens of all ranks
    weighted = xp.sum(counts * xp.sum(_shares(platform, routing), axis=0))
    return weighted * (num_experts * top_k * mesh.size()) / (choices * choices)


def router_z_loss(platform: Platform[Any], routing: Routing) -> Any:
    """The mean of ``logsumexp(logits)**2`` over tokens (ST-MoE, arXiv:2202.08906, eq. 5): a float32 scalar."""
    xp = platform.xp
    log_sums = _without_padding(platform, routing, logsumexp(platform, routing.logits))  # [T]
    return xp.sum(log_sums * log_sums) / xp.maximum(
        xp.sum(_real_tokens(platform, routing, 1)), xp.ones((), dtype=xp.float32)
    )


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
    """The scores of all experts, scaled to sum to one for each token, zero for padding: ``[T, E]``."""
    total = platform.xp.sum(routing.probabilities, axis=1, keepdims=True)
    # All may be zero where a sigmoid underflows.
    return _without_padding(platform, routing, routing.probabilities / (total + 1e-20))


def _without_padding(platform: Platform[Any], routing: Routing, x: Any) -> Any:
    """*x* ``[T, ...]`` with zeros for padding."""
    if routing.mask is None:
        return x
    xp = platform.xp
    mask = xp.reshape(routing.mask, (routing.mask.shape[0], *[1] * (x.ndim - 1)))
    return xp.where(xp.broadcast_to(mask, x.shape), x, xp.zeros_like(x))


def _real_tokens(platform: Platform[Any], routing: Routing, sequences: int) -> Any:
    """How many tokens of each of *sequences* are no padding: float32 ``[sequences]``."""
    xp = platform.xp
    length = routing.experts.shape[0] // sequences
    if routing.mask is None:
        return xp.full((sequences,), float(length), dtype=xp.float32)
    return xp.sum(xp.reshape(xp.astype(routing.mask, xp.float32), (sequences, length)), axis=1)
