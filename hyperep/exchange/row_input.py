# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the input of a dispatch of rows, and the small message that tells it along with the counts."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperep.exchange.faults import Check, Common, Said, dtype_name, dtype_number, kind_of
from hyperep.platform.protocol import Platform

__all__ = ["CHECK", "HEADER", "RowInput", "inspect"]

_FOREIGN_TENSOR, _NO_ROWS, _NOT_FLAT, _NO_NUMBER, _WRONG_LENGTH, _NOT_INTEGER, _INDIVISIBLE = range(1, 8)


def _judge(values: Sequence[int], measured: Sequence[int]) -> tuple[type[Exception], str] | None:
    (rows, _), (total, least) = values, measured
    if least < 0:
        return ValueError, f"tokens_per_expert holds {least}; counts cannot be negative"
    if total != rows:
        return ValueError, f"tokens_per_expert sums to {total} but there are {rows} rows; every row needs one expert"
    return None


CHECK = Check(
    call="dispatch",
    faults={
        _FOREIGN_TENSOR: (
            TypeError,
            "rows and tokens_per_expert must be tensors of platform {platform!r}, dense and on its device {device}; "
            "convert NumPy arrays with platform.from_host, or make the mesh with the platform of your tensors",
        ),
        _NO_ROWS: (ValueError, "rows has no dims; its first dim counts the rows, as in [N, D]"),
        _NOT_FLAT: (ValueError, "tokens_per_expert has {0} dims; give one count for each expert, as in [E]"),
        _NO_NUMBER: (TypeError, "num_experts must be a whole number, 0 or more; leave it out for the number of counts"),
        _WRONG_LENGTH: (
            ValueError,
            "tokens_per_expert has {0} entries, but num_experts={1}: give one count for each expert",
        ),
        _NOT_INTEGER: (TypeError, "tokens_per_expert must hold int32 or int64 counts; cast it"),
        _INDIVISIBLE: (
            ValueError,
            "num_experts={0} is not divisible by the {1} ranks of {mesh}; "
            "choose a number of experts that is a multiple of {1}, or another mesh",
        ),
    },
    common=(
        Common(
            what="the number of experts",
            describe=str,
            rule="it is num_experts, or else the number of counts, and must be the same on all ranks",
        ),
        Common(
            what="a row",
            describe=lambda width, dtype: f"{width} x {dtype_name(dtype)}",
            rule="rows must have one size and dtype on all ranks, also on a rank that has none",
            size=2,
        ),
    ),
    measured=2,  # sum and least of the counts
    judge=_judge,
)

HEADER = CHECK.header
"""Integers of each rank's message beside its counts."""


@dataclass(frozen=True)
class RowInput:
    """This rank's input, looked at without reading any value of it."""

    said: Said
    experts: int
    """``E``, as far as this rank knows it."""
    counts: Any = None
    """The counts as an int64 tensor ``[R, L]``; ``None`` if something is wrong."""

    def message(self, platform: Platform[Any], ranks: int, room: int) -> Any:
        """What this rank sends: int64 ``[R, room + HEADER]``, for each rank its counts, or as many as there is room."""
        if self.counts is None:
            return CHECK.message(platform, ranks, room, self.said)
        xp = platform.xp
        if self.experts:
            measured = xp.stack([xp.sum(self.counts), xp.min(self.counts)])  # [2]
        else:
            measured = xp.zeros((2,), dtype=xp.int64)
        return CHECK.message(platform, ranks, room, self.said, [self.counts[:, :room]], measured)


def inspect(platform: Platform[Any], rows: Any, tokens_per_expert: Any, num_experts: Any, ranks: int) -> RowInput:
    """Look for what is wrong with this rank's input; nothing is raised, so that every rank can be told."""

    def faulty(code: int, values: tuple[int, int] = (0, 0), detail: str = "") -> RowInput:
        return RowInput(Said(fault=code, values=values, common=(0, 0, 0), detail=detail), 0)

    for what, value in (("rows", rows), ("tokens_per_expert", tokens_per_expert)):
        if not platform.is_tensor(value):
            return faulty(_FOREIGN_TENSOR, detail=f"{what} is a {kind_of(value)}")
    if not len(rows.shape):
        return faulty(_NO_ROWS)
    if len(tokens_per_expert.shape) != 1:
        return faulty(_NOT_FLAT, (len(tokens_per_expert.shape), 0))
    length = int(tokens_per_expert.shape[0])
    try:
        experts = length if num_experts is None else operator.index(num_experts)
    except TypeError:
        return faulty(_NO_NUMBER, detail=f"num_experts is {num_experts!r}")
    if experts < 0:
        return faulty(_NO_NUMBER, detail=f"num_experts is {num_experts!r}")
    if length != experts:
        return faulty(_WRONG_LENGTH, (length, experts))
    if tokens_per_expert.dtype not in (platform.xp.int32, platform.xp.int64):
        return faulty(_NOT_INTEGER, detail=f"tokens_per_expert has dtype {tokens_per_expert.dtype}")
    if experts % ranks:
        return faulty(_INDIVISIBLE, (experts, ranks))
    xp = platform.xp
    counts = tokens_per_expert if tokens_per_expert.dtype == xp.int64 else xp.astype(tokens_per_expert, xp.int64)
    row = (math.prod(rows.shape[1:]), dtype_number(xp, rows.dtype))
    said = Said(values=(int(rows.shape[0]), 0), common=(experts, *row))
    return RowInput(said, experts, xp.reshape(counts, (ranks, experts // ranks)))
