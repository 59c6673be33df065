# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with the input of a dispatch of tokens, and the small message that tells it with the counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.exchange.copies import choices_by_rank
from hyperep.exchange.faults import Check, Common, Said, dtype_name, dtype_number, is_floating, kind_of
from hyperep.platform.protocol import Platform

__all__ = ["CHECK", "HEADER", "Counts", "TokenInput", "header", "inspect", "most_tokens"]

Bounds = Sequence[tuple[int, int]]
"""Where each part of the tokens begins and ends."""


_FOREIGN_TENSOR, _TOKENS, _INDICES, _WEIGHTS, _NOT_INTEGER, _NOT_FLOATING = range(1, 7)
_COUNTS = 2
"""Of copies of tokens, and of choices, for each rank and part: what the message holds beside the header."""


def _judge(values: Sequence[int], measured: Sequence[int]) -> tuple[type[Exception], str] | None:
    (num_experts, _), (least, greatest) = values, measured
    if least < 0 or greatest > num_experts:
        return ValueError, (
            f"indices hold {least if least < 0 else greatest}; experts are numbered from 0 to {num_experts - 1}, and "
            f"{num_experts} means nobody"
        )
    return None


CHECK = Check(
    call="dispatch of tokens",
    faults={
        _FOREIGN_TENSOR: (
            TypeError,
            "tokens, indices and weights must be tensors of platform {platform!r}, dense and on its device {device}; "
            "convert NumPy arrays with platform.from_host, or make the mesh with the platform of your tensors",
        ),
        _TOKENS: (ValueError, "tokens have {0} dims; they must be [T, D]"),
        _INDICES: (ValueError, "indices must be [T, K], one row for each token"),
        _WEIGHTS: (ValueError, "weights must be [T, K], as the indices are"),
        _NOT_INTEGER: (TypeError, "indices must be int32 or int64 numbers of experts; cast them"),
        _NOT_FLOATING: (TypeError, "weights must be of a floating dtype; cast them"),
    },
    common=(
        Common(
            what="the number of experts",
            describe=str,
            rule="it must be the same on all ranks",
        ),
        Common(
            what="a token",
            describe=lambda width, dtype, top_k, of: (
                f"{width} x {dtype_name(dtype)} with {top_k} weights in {dtype_name(of)}"
            ),
            rule="tokens must have one size, dtype and number of choices on all ranks, also on a rank that has none",
            size=4,
        ),
    ),
    measured=2,  # least and greatest index
    judge=_judge,
)


def header(parts: int = 1) -> int:
    """Integers that a rank tells each other one, the two counts of each part included."""
    return _COUNTS * parts + CHECK.header


HEADER = header()
"""Those of tokens that travel in one part."""


@dataclass(frozen=True)
class TokenInput:
    """This rank's input, looked at without reading any value of it."""

    said: Said
    by_rank: Any = None
    """How many choices of each token each rank owns, int64 ``[R, T]``; ``None`` if something is wrong."""
    indices: Any = None

    def message(self, platform: Platform[Any], ranks: int, parts: Bounds) -> Any:
        """What this rank sends: int64 ``[R, 2 C + header]``, for each rank copies and choices of each of C parts."""
        room = _COUNTS * len(parts)
        if self.by_rank is None:
            return self.told(platform, ranks, room)
        xp = platform.xp
        sent = xp.astype(self.by_rank > 0, xp.int64)  # [R, T]
        both = xp.stack([sent, self.by_rank], axis=1)  # [R, 2, T]
        return self.told(platform, ranks, room, *(xp.sum(both[:, :, a:b], axis=2) for a, b in parts))  # C of [R, 2]

    def told(self, platform: Platform[Any], ranks: int, room: int, *counts: Any) -> Any:
        """A message of *counts*, int64, *room* columns together, and the header; without counts for a faulty input."""
        if self.by_rank is None:
            return CHECK.message(platform, ranks, room, self.said)
        xp = platform.xp
        if math.prod(self.indices.shape):
            extremes = xp.stack([xp.min(self.indices), xp.max(self.indices)])
            extremes = extremes if extremes.dtype == xp.int64 else xp.astype(extremes, xp.int64)
        else:
            extremes = xp.zeros((2,), dtype=xp.int64)
        return CHECK.message(platform, ranks, room, self.said, counts, extremes)


@dataclass(frozen=True)
class Counts:
    """What goes to, or comes from, the ranks of a mesh, for each part of the tokens."""

    copies: tuple[tuple[int, ...], ...]
    """Copies of tokens, by part and rank."""
    choices: tuple[int, ...]
    """How many choices of them all are somebody's, by part."""

    @classmethod
    def of(cls, host_message: np.ndarray, parts: int) -> Counts:
        """Those that a message tells."""
        told = host_message[:, : _COUNTS * parts].T.tolist()  # small; Python adds its numbers faster than NumPy
        return cls(tuple(map(tuple, told[::_COUNTS])), tuple(map(sum, told[1::_COUNTS])))

    def joined(self, parts: int) -> Counts:
        """The same for fewer *parts*, a divisor of what there are."""
        copies = np.array(self.copies, dtype=np.int64).reshape(parts, -1, len(self.copies[0])).sum(axis=1)
        choices = np.array(self.choices, dtype=np.int64).reshape(parts, -1).sum(axis=1)
        return Counts(tuple(map(tuple, copies.tolist())), tuple(choices.tolist()))


def most_tokens(host_message: np.ndarray) -> int:
    """The tokens of the rank that has the most; from faultless messages of all ranks."""
    return int(host_message[:, -CHECK.header + 2].max())


def inspect(
    platform: Platform[Any], tokens: Any, indices: Any, weights: Any, num_experts: int, ranks: int
) -> TokenInput:
    """Look for what is wrong with this rank's input; nothing is raised, so that every rank can be told."""

    def faulty(code: int, detail: str, values: tuple[int, int] = (0, 0)) -> TokenInput:
        return TokenInput(Said(fault=code, values=values, common=(0, 0, 0, 0, 0), detail=detail))

    for what, value in (("tokens", tokens), ("indices", indices), ("weights", weights)):
        if not platform.is_tensor(value):
            return faulty(_FOREIGN_TENSOR, f"{what} is a {kind_of(value)}")
    shapes = [tuple(x.shape) for x in (tokens, indices, weights)]
    told = f"tokens {shapes[0]}, indices {shapes[1]}, weights {shapes[2]}"
    if len(shapes[0]) != 2:
        return faulty(_TOKENS, told, (len(shapes[0]), 0))
    if len(shapes[1]) != 2 or shapes[1][0] != shapes[0][0]:
        return faulty(_INDICES, told)
    if shapes[2] != shapes[1]:
        return faulty(_WEIGHTS, told)
    xp = platform.xp
    if indices.dtype not in (xp.int32, xp.int64):
        return faulty(_NOT_INTEGER, f"indices have dtype {indices.dtype}")
    weighed_in = dtype_number(xp, weights.dtype)
    if not is_floating(weighed_in):
        return faulty(_NOT_FLOATING, f"weights have dtype {weights.dtype}")
    token = (shapes[0][1], dtype_number(xp, tokens.dtype), shapes[1][1], weighed_in)
    said = Said(values=(num_experts, shapes[0][0]), common=(num_experts, *token))
    return TokenInput(said, choices_by_rank(platform, indices, ranks, num_experts // ranks), indices)
