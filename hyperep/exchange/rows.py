# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine: rows go to the ranks that own their experts, and come back.

The way of a token, of which this file is the middle::

    route -> sort by expert -> DISPATCH -> experts -> COMBINE -> weight by score, sum over top-k

    dispatch                                             collectives        host copies
      1. exchange counts                                 1 small
      2. copy the counts, sent and received, to the host                    1
      3. exchange rows (differentiable)                  1 large
      4. permute rank-major to expert-major
    combine
      5. permute expert-major to rank-major
      6. exchange rows back (differentiable)             1 large

Backward issues the two large exchanges again, in reverse, and copies nothing to the host. What combine needs is in a
frozen ``DispatchContext``: nothing is stored on a style or a module, so calls may interleave and memory dies with
the graph. The scheme is that of GShard (arXiv:2006.16668) without its capacity: no row is ever dropped or padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperep.exchange import faults
from hyperep.mesh import DeviceMesh
from hyperep.permutation import (
    Permutation,
    apply_permutation,
    device_permutation,
    unpermute,
)
from hyperep.platform.protocol import Group, Platform

__all__ = ["DispatchContext", "combine", "dispatch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchContext:
    """What one dispatch leaves for its combine."""

    platform: Platform[Any] = field(repr=False)
    group: Group = field(repr=False)
    input_splits: tuple[int, ...]
    """Rows that this rank sent to each rank of the group."""
    output_splits: tuple[int, ...]
    """Rows that it received from each."""
    tokens_per_local_expert: tuple[int, ...]
    """Rows of each of this rank's experts, from all ranks together: the host's copy of the counts."""
    permutation: Permutation = field(repr=False)
    """Rank-major to expert-major."""


def dispatch(
    rows: Any, tokens_per_expert: Any, mesh: DeviceMesh, *, num_experts: int | None = None
) -> tuple[Any, Any, DispatchContext]:
    """Send each row to the rank that owns its expert.

    Collective over the mesh. Differentiable in *rows*.

    Args:
        rows: tensor ``[N, ...]``, sorted by expert.
        tokens_per_expert: int32 or int64 tensor ``[E]``: how many of this rank's rows go to each expert.
        mesh: 1-D mesh of ``R`` ranks; rank ``r`` owns experts ``r * E / R`` and following.
        num_experts: ``E``, the same on all ranks. Left out, the length of the counts is taken on trust.

    Returns:
        The rows of this rank's experts, expert-major and within an expert by source rank; an int64 tensor
        ``[E / R]`` of their counts; and the context that :func:`combine` takes.

    Raises:
        ValueError: on all ranks of the mesh, naming the rank at fault: the counts have the wrong length, hold a
            negative, or do not sum to the rows; or a row is not of the size and dtype that it has on the other ranks.
            On this rank: the mesh is not 1-D, or ``E`` is not divisible by ``R``.
        TypeError: on all ranks, if one got tensors of another platform or counts that are not integers.
    """
    platform, group, ranks = mesh.platform, mesh.get_group(), mesh.size()
    local_fault = faults.find(platform, rows, tokens_per_expert, num_experts)
    experts = faults.number_of_experts(tokens_per_expert, num_experts)
    if experts % ranks:
        raise ValueError(
            f"num_experts={experts} is not divisible by the {ranks} ranks of {mesh}; "
            f"choose a number of experts that is a multiple of {ranks}, or another mesh"
        )

    # 1. Exchange counts. Headers travel with them, so that bad input on one rank is an error on every rank.
    message = faults.message(platform, rows, tokens_per_expert, ranks, experts, local_fault)  # [R, L + header]
    received = platform.all_to_all_single(message, group=group)  # [R, L + header]

    # 2. Host sync here, the only one: everything below is computed from this copy.
    sent_host, received_host = platform.to_host(message, received)
    faults.raise_any(mesh, received_host, local_fault)
    sent, counts = (faults.counts_of(m) for m in (sent_host, received_host))  # [R, L] both
    input_splits, output_splits = _totals(sent), _totals(counts)

    # 3. Exchange rows.
    rows = platform.differentiable_all_to_all_single(rows, input_splits, output_splits, group)

    # 4. Rank-major to expert-major.
    tokens_per_local_expert = counts.sum(axis=0)  # [L]
    permutation = device_permutation(platform, counts)
    context = DispatchContext(
        platform=platform,
        group=group,
        input_splits=input_splits,
        output_splits=output_splits,
        tokens_per_local_expert=tuple(tokens_per_local_expert.tolist()),
        permutation=permutation,
    )
    return apply_permutation(platform, rows, permutation), platform.from_host(tokens_per_local_expert), context


def combine(rows: Any, context: DispatchContext) -> Any:
    """Send each row back to where :func:`dispatch` took it from, in the order it had there.

    Collective over the mesh of the dispatch; no host copy. Differentiable in *rows*.

    Args:
        rows: what the experts made of the dispatched rows, ``[N', ...]``, one row for each and in the same order;
            the other dims may differ from what was dispatched.
        context: from the dispatch.

    Raises:
        ValueError: the number of rows is not that of the dispatch. On this rank only, since telling the others would
            cost a collective: they wait until this one ends, or for the deadline of their exchange.
    """
    expected = sum(context.output_splits)
    if rows.shape[0] != expected:
        raise ValueError(
            f"combine got {rows.shape[0]} rows but the dispatch delivered {expected}; "
            "experts must return one row for each row, in the same order"
        )
    platform = context.platform
    # 5. Expert-major to rank-major.
    rows = unpermute(rows, context.permutation, platform=platform)
    # 6. Exchange rows back: the splits of the dispatch, exchanged.
    return platform.differentiable_all_to_all_single(rows, context.output_splits, context.input_splits, context.group)


def _totals(counts: np.ndarray) -> tuple[int, ...]:
    totals: Sequence[int] = counts.sum(axis=1).tolist()
    return tuple(totals)
