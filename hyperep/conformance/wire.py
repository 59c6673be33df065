# SPDX-License-Identifier: Apache-2.0
"""What is handed to ``all_to_all_single``: to whom, and how many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hyperep.conformance.case import Case
from hyperep.platform.dtypes import dtype_named

__all__ = ["Message", "sent", "watching"]

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Message:
    """What one call sends."""

    group: Any
    rows: int
    row_bytes: int
    splits: tuple[int, ...] | None
    """Rows for each rank of the group; as many for each if left out."""


@contextmanager
def watching(case: Case) -> Iterator[list[Message]]:
    """A list of what is sent inside the block, in order."""
    messages: list[Message] = []
    exchange = case.platform.all_to_all_single

    def watched(
        x: Any,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        splits = None if input_splits is None else tuple(map(int, input_splits))
        messages.append(Message(group, x.shape[0], math.prod(x.shape[1:]) * _size(case, x.dtype), splits))
        return exchange(x, output_splits, input_splits, group, async_op)

    case.platform.all_to_all_single = watched
    try:
        yield messages
    finally:
        del case.platform.all_to_all_single


def sent(messages: Iterable[Message], ranks: int) -> list[int]:
    """Bytes for each rank, its own included, of *messages* in a group of so many."""
    total = [0] * ranks
    for message in messages:
        splits = message.splits or (message.rows // ranks,) * ranks
        total = [old + message.row_bytes * n for old, n in zip(total, splits, strict=True)]
    return total


def _size(case: Case, dtype: Any) -> int:
    return _BYTES[dtype_named(case.xp, dtype, _BYTES) or str(dtype)]
