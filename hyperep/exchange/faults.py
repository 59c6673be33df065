# SPDX-License-Identifier: Apache-2.0
"""Bad input to a dispatch, made known to every rank.

An error raised on one rank only leaves its peers waiting in the next collective. So each rank sends a header of six
integers along with its counts, and after the one host copy every rank reads all headers and raises the same error.
Rows of different sizes on different ranks are wrong too, though each rank by itself is right: the exchange would read
past them, or end the process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Platform

__all__ = ["HEADER", "Fault", "counts_of", "find", "message", "number_of_experts", "raise_any"]

HEADER = 6
"""Integers after each rank's counts: a fault code and its values; without a fault the number of rows, the elements and
the dtype of a row, and sum and least of the counts."""

_NO_FAULT, _WRONG_LENGTH, _NOT_INTEGER, _FOREIGN_TENSOR, _NO_ROWS = range(5)

_DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool", "another dtype")
"""Dtypes of rows, by which ranks tell each other theirs; a platform may lack some."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with this rank's input that can be seen without reading its values."""

    code: int
    values: tuple[int, int] = (0, 0)
    detail: str = ""
    """What only this rank can say, such as the name of a type."""


def find(platform: Platform[Any], rows: Any, tokens_per_expert: Any, num_experts: int | None) -> Fault | None:
    """The first fault of this rank's input, if there is one."""
    for what, value in (("rows", rows), ("tokens_per_expert", tokens_per_expert)):
        if not platform.is_tensor(value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return Fault(_FOREIGN_TENSOR, detail=f"{what} is a {kind}")
    if not len(rows.shape):
        return Fault(_NO_ROWS)
    shape = tuple(tokens_per_expert.shape)
    if len(shape) != 1 or (num_experts is not None and shape[0] != num_experts):
        return Fault(_WRONG_LENGTH, (shape[0] if len(shape) == 1 else -len(shape), num_experts or 0))
    if tokens_per_expert.dtype not in (platform.xp.int32, platform.xp.int64):
        return Fault(_NOT_INTEGER, detail=f"tokens_per_expert has dtype {tokens_per_expert.dtype}")
    return None


def number_of_experts(tokens_per_expert: Any, num_experts: int | None) -> int:
    """``E``, from the caller or else from the length of the counts."""
    if num_experts is not None:
        return num_experts
    shape: tuple[int, ...] = getattr(tokens_per_expert, "shape", ())
    return int(shape[0]) if len(shape) else 0


def message(
    platform: Platform[Any], rows: Any, tokens_per_expert: Any, ranks: int, experts: int, fault: Fault | None
) -> Any:
    """What this rank sends: int64 ``[R, L + HEADER]``, for each rank the counts of its experts, then the header."""
    local = experts // ranks
    if fault is not None:
        empty = np.zeros((ranks, local + HEADER), dtype=np.int64)
        empty[:, local : local + 3] = (fault.code, *fault.values)
        return platform.from_host(empty)
    xp = platform.xp
    counts = tokens_per_expert if tokens_per_expert.dtype == xp.int64 else xp.astype(tokens_per_expert, xp.int64)
    if experts:
        totals = xp.stack([xp.sum(counts), xp.min(counts)])  # [2]
    else:
        totals = xp.zeros((2,), dtype=xp.int64)
    known = np.array([_NO_FAULT, rows.shape[0], math.prod(rows.shape[1:]), _dtype_number(xp, rows.dtype)], np.int64)
    known_rows = platform.from_host(np.tile(known, (ranks, 1)))  # [R, 4]
    return xp.concat([xp.reshape(counts, (ranks, local)), known_rows, xp.broadcast_to(totals, (ranks, 2))], axis=1)


def counts_of(host_message: np.ndarray) -> np.ndarray:
    """The counts of a message, ``[R, L]``."""
    return host_message[:, :-HEADER]


def raise_any(mesh: DeviceMesh, received: np.ndarray, own: Fault | None) -> None:
    """Raise the error of the first rank of the mesh that is at fault; the same on all ranks."""
    headers = received[:, -HEADER:].tolist()
    for position, header in enumerate(headers):
        error = _error(header, mesh.platform.name)
        if error is not None:
            rank = int(mesh.ranks[position])
            detail = f" ({own.detail})" if own is not None and own.detail and rank == mesh.platform.rank else ""
            raise type(error)(f"dispatch on rank {rank}: {error}{detail}")
    kinds = [f"{width} x {_DTYPES[dtype]}" for _, _, width, dtype, _, _ in headers]
    if len(set(kinds)) > 1:
        other = next(position for position, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"dispatch on rank {int(mesh.ranks[other])}: a row is {kinds[other]}, but on rank {int(mesh.ranks[0])} it "
            f"is {kinds[0]}; rows must have one size and dtype on all ranks, also on a rank that has none"
        )


def _dtype_number(xp: Any, dtype: Any) -> int:
    known = (i for i, name in enumerate(_DTYPES) if hasattr(xp, name) and dtype == getattr(xp, name))
    return next(known, len(_DTYPES) - 1)


def _error(header: list[int], platform: str) -> Exception | None:
    code, first, second, _, total, least = header
    if code == _WRONG_LENGTH:
        shape = f"has {first} entries" if first >= 0 else f"has {-first} dims"
        return ValueError(f"tokens_per_expert {shape}, but num_experts={second}: give one count for each expert")
    if code == _NOT_INTEGER:
        return TypeError("tokens_per_expert must hold int32 or int64 counts; cast it")
    if code == _FOREIGN_TENSOR:
        return TypeError(
            f"rows and tokens_per_expert must be tensors of platform {platform!r}; "
            "convert NumPy arrays with platform.from_host, or make the mesh with the platform of your tensors"
        )
    if code == _NO_ROWS:
        return ValueError("rows has no dims; its first dim counts the rows, as in [N, D]")
    if least < 0:
        return ValueError(f"tokens_per_expert holds {least}; counts cannot be negative")
    if total != first:
        return ValueError(f"tokens_per_expert sums to {total} but there are {first} rows; every row needs one expert")
    return None
