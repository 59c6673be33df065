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

from hyperep.exchange import row_input
from hyperep.exchange.faults import kind_of
from hyperep.mesh import DeviceMesh
from hyperep.permutation import (
    Permutation,
    apply_permutation,
    device_permutation,
    unpermute,
)
from hyperep.platform.dtypes import dtype_named
from hyperep.platform.protocol import Group, Platform
from hyperep.platform.selection import adopt_mesh

__all__ = ["ROOM", "DispatchContext", "combine", "dispatch", "dispatch_agreed"]

ROOM = 128
"""Counts that the message of a dispatch holds for each rank where the ranks have not agreed on a number of experts."""

_WIDTHS = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
"""Floating dtypes by width: a narrower one fits into a wider one without loss."""


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
    row_shape: tuple[int, ...]
    """Shape of one row, which all ranks have agreed on."""
    dtype: Any
    """And its dtype."""


def dispatch(
    rows: Any, tokens_per_expert: Any, mesh: DeviceMesh, *, num_experts: int | None = None
) -> tuple[Any, Any, DispatchContext]:
    """Send each row to the rank that owns its expert.

    Collective over the mesh. Differentiable in *rows*. The small exchange and the copy to the host are one each for up
    to ``ROOM`` experts a rank, and two for more: ranks may disagree on ``E``, so the first message has a fixed length.

    Args:
        rows: tensor ``[N, ...]``, sorted by expert.
        tokens_per_expert: int32 or int64 tensor ``[E]``: how many of this rank's rows go to each expert.
        mesh: 1-D mesh of ``R`` ranks, or a native one; rank ``r`` owns experts ``r * E / R`` and following.
        num_experts: ``E``, the same on all ranks. Left out, it is the length of the counts.

    Returns:
        The rows of this rank's experts, expert-major and within an expert by source rank; an int64 tensor
        ``[E / R]`` of their counts; and the context that :func:`combine` takes.

    Raises:
        ValueError: on all ranks of the mesh, naming the rank at fault: the counts have the wrong length, hold a
            negative, or do not sum to the rows; ``E`` is not divisible by ``R``; ``E``, or the size and dtype of a row,
            is not what it is on the other ranks. On this rank: the mesh is not 1-D.
        TypeError: on all ranks, if one got tensors of another platform or device, sparse ones, or no whole numbers.
    """
    mesh = adopt_mesh(mesh)
    ranks = mesh.size()
    given = row_input.inspect(mesh.platform, rows, tokens_per_expert, num_experts, ranks)
    # A rank that is alone agrees with itself.
    return _dispatch(rows, given, mesh, room=ROOM if ranks > 1 else given.experts)


def dispatch_agreed(
    rows: Any, tokens_per_expert: Any, mesh: DeviceMesh, num_experts: int
) -> tuple[Any, Any, DispatchContext]:
    """:func:`dispatch` where the ranks have agreed on the number of experts before, as where a style was applied.

    The small message then has room for the counts and no more: one exchange and one host copy for any number.
    """
    given = row_input.inspect(mesh.platform, rows, tokens_per_expert, num_experts, mesh.size())
    return _dispatch(rows, given, mesh, room=num_experts // mesh.size())


def _dispatch(rows: Any, given: row_input.RowInput, mesh: DeviceMesh, room: int) -> tuple[Any, Any, DispatchContext]:
    platform, group, ranks = mesh.platform, mesh.get_group(), mesh.size()

    # 1. Exchange counts. Headers travel with them, so that bad input on one rank is an error on every rank.
    message = given.message(platform, ranks, room)  # [R, room + header]
    received = platform.all_to_all_single(message, group=group)  # [R, room + header]

    # 2. Host sync here, the only one: everything below is computed from this copy.
    sent_host, received_host = platform.to_host(message, received)
    row_input.CHECK.raise_any(mesh, received_host, given.said)
    local = given.experts // ranks
    sent, counts = (m[:, : min(local, room)] for m in (sent_host, received_host))  # [R, L] both
    if local > room:  # what there was no room for, now that all ranks know how much it is: a second copy
        rest = given.counts[:, room:]
        more = platform.to_host(rest, platform.all_to_all_single(rest, group=group))
        sent, counts = (np.concatenate(parts, axis=1) for parts in zip((sent, counts), more, strict=True))
    input_splits, output_splits = _totals(sent), _totals(counts)

    # 3. Exchange rows.
    row_shape, dtype = tuple(rows.shape[1:]), rows.dtype
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
        row_shape=row_shape,
        dtype=dtype,
    )
    return apply_permutation(platform, rows, permutation), platform.from_host(tokens_per_local_expert), context


def combine(rows: Any, context: DispatchContext, *, row_shape: Sequence[int] | None = None, dtype: Any = None) -> Any:
    """Send each row back to where :func:`dispatch` took it from, in the order it had there.

    Collective over the mesh of the dispatch; no host copy. Differentiable in *rows*.

    Ranks agreed on the size and dtype of a row when they were dispatched, and nothing is agreed on here. So rows go
    back as they came: one of a narrower floating dtype (as under autocast) travels in the dtype of the dispatch, which
    loses nothing, and has its own again afterwards. What is to travel otherwise is told, alike on all ranks.

    Args:
        rows: what the experts made of the dispatched rows, ``[N', ...]``, one row for each and in the same order.
        context: from the dispatch.
        row_shape: shape of one row, where it is not that of the dispatch.
        dtype: dtype in which they travel, where it is not that of the dispatch.

    Raises:
        ValueError: the number of rows, their shape or their dtype is not what was dispatched or told.
        TypeError: no tensor of the platform, or no context. Both on this rank only, before anything is sent: telling
            the others would cost a collective. They wait until this rank ends, or for the deadline of their exchange.
    """
    if not isinstance(context, DispatchContext):
        raise TypeError(f"combine(context={context!r}): give the context that dispatch returned, its third value")
    platform = context.platform
    where = f"combine on rank {platform.rank}"
    if not platform.is_tensor(rows):
        raise TypeError(
            f"{where}: rows is a {kind_of(rows)}, but must be a tensor of platform {platform.name!r}, dense and on its "
            f"device {platform.device}"
        )
    expected = sum(context.output_splits)
    if not len(rows.shape) or rows.shape[0] != expected:
        raise ValueError(
            f"{where}: got {rows.shape[0] if len(rows.shape) else 'no'} rows but the dispatch delivered {expected}; "
            "experts must return one row for each row, in the same order"
        )
    shape = context.row_shape if row_shape is None else tuple(row_shape)
    if tuple(rows.shape[1:]) != shape:
        says = "the dispatch" if row_shape is None else "row_shape"
        raise ValueError(
            f"{where}: a row has shape {tuple(rows.shape[1:])} but {says} says {shape}; "
            "rows go back as they came, also on a rank that has none, or else all ranks give row_shape="
        )
    carrier = context.dtype if dtype is None else dtype
    own = rows.dtype
    if own != carrier:
        if not _fits(platform.xp, own, carrier):
            says = "the dispatch" if dtype is None else "dtype"
            raise ValueError(
                f"{where}: rows are {own} but {says} says {carrier}; "
                "return that or a narrower floating dtype, also on a rank without rows, or else all ranks give dtype="
            )
        rows = platform.xp.astype(rows, carrier)
    # 5. Expert-major to rank-major.
    rows = unpermute(rows, context.permutation, platform=platform)
    # 6. Exchange rows back: the splits of the dispatch, exchanged.
    rows = platform.differentiable_all_to_all_single(rows, context.output_splits, context.input_splits, context.group)
    return rows if own == carrier else platform.xp.astype(rows, own)


def _fits(xp: Any, narrow: Any, wide: Any) -> bool:
    """Whether every number of one floating dtype is one of the other."""

    def width(dtype: Any) -> int:
        return _WIDTHS.get(dtype_named(xp, dtype, _WIDTHS) or "", 0)

    return 0 < width(narrow) < width(wide)


def _totals(counts: np.ndarray) -> tuple[int, ...]:
    totals: Sequence[int] = counts.sum(axis=1).tolist()
    return tuple(totals)
