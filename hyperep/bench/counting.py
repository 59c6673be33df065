# SPDX-License-Identifier: Apache-2.0
"""``CountingPlatform``: stands before a platform, and counts what the core asks it to move."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.bench.between import Between, Route
from hyperep.exchange.faults import dtype_bytes
from hyperep.platform.protocol import Group, Platform

__all__ = ["CountingPlatform", "Counts", "nbytes"]


@dataclass
class Counts:
    """What was moved since the counts were taken last."""

    host_copies: int = 0
    small: int = 0
    """Exchanges of integers, which are counts."""
    large: int = 0
    """Exchanges of rows or tokens, and of what belongs to them."""
    sent: Counter[int] = field(default_factory=Counter)
    """Bytes that left this rank for another one, by world rank."""

    @property
    def wire_bytes(self) -> int:
        """Bytes that left this rank for another one."""
        return self.sent.total()


class CountingPlatform(Between):
    """Counts the copies to the host and the all-to-alls of a platform."""

    def __init__(self, platform: Platform[Any]) -> None:
        super().__init__(platform)
        self._counts = Counts()
        self._members: list[tuple[Group, list[int]]] = [(None, list(range(platform.world_size)))]

    def take(self) -> Counts:
        """The counts since the last call."""
        counts, self._counts = self._counts, Counts()
        return counts

    def new_group(self, ranks: Sequence[int]) -> Group:
        """Remember who is in it."""
        group = self._platform.new_group(ranks)
        if self._platform.rank in ranks:
            self._members.append((group, list(ranks)))
        return group

    def to_host(self, *tensors: Any) -> Any:
        """Count one copy."""
        self._counts.host_copies += 1
        return self._platform.to_host(*tensors)

    def _exchange(self, x: Any, route: Route, async_op: bool) -> Any:
        _, input_splits, group = route
        members = next(ranks for known, ranks in self._members if known is group)
        rows = x.shape[0]
        splits = [rows // len(members)] * len(members) if input_splits is None else input_splits
        for rank, count in zip(members, splits, strict=True):
            if rank != self._platform.rank and count:
                self._counts.sent[rank] += nbytes(x) // rows * count
        if "int" in str(x.dtype).lower():
            self._counts.small += 1
        else:
            self._counts.large += 1
        return self._platform.all_to_all_single(x, *route, async_op)


def nbytes(x: Any) -> int:
    """Size of a tensor of numbers, from its shape and the name of its dtype."""
    return math.prod(map(int, x.shape)) * dtype_bytes(x.dtype)
