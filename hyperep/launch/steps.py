# SPDX-License-Identifier: Apache-2.0
"""Steps of a program: who runs it says when one is done, and who watches sees when none is.

A rank counts its steps where its watcher can read the count without asking, because a rank that hangs does not answer,
and must not wait for a watcher that is asleep.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from hyperep.launch.timeout import TIMEOUT_VARIABLE

__all__ = ["LateRanks", "StepCounts", "StepsOverdue", "counting_steps", "current_step_limit", "step_done", "step_limit"]

_count_step: ContextVar[Callable[[], None] | None] = ContextVar("hyperep_count_step", default=None)
_limit: ContextVar[float | None] = ContextVar("hyperep_step_limit", default=None)


def step_done() -> None:
    """Say that this rank has done one more step. Without anybody who watches it, this does nothing."""
    count = _count_step.get()
    if count is not None:
        count()


@contextmanager
def counting_steps(count: Callable[[], None]) -> Iterator[None]:
    """Call *count* for each step that is done inside the block, in this thread."""
    token = _count_step.set(count)
    try:
        yield
    finally:
        _count_step.reset(token)


@contextmanager
def step_limit(seconds: float | None) -> Iterator[None]:
    """Let who starts ranks as threads, inside the block and in this thread, give each step of theirs *seconds*."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def current_step_limit() -> float | None:
    """The seconds of the innermost :func:`step_limit`; ``None`` outside."""
    return _limit.get()


class StepsOverdue(RuntimeError):
    """A rank has done no step for longer than one may take."""

    def __init__(self, ranks: Sequence[int], world: int, seconds: float) -> None:
        who = (
            "no rank"
            if len(ranks) == world
            else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {world}"
        )
        done = "has done a step" if len(ranks) == world else "did no step"
        super().__init__(f"{who} {done} for {seconds:g} s; --timeout or {TIMEOUT_VARIABLE} sets how long one may take")


class StepCounts:
    """How many steps each rank has done, in a file that ranks write and their watcher reads; nobody waits for anybody.

    Args:
        descriptor: of the file, open for reading and writing.
    """

    _FORM = struct.Struct("=q")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, position: int, count: int) -> None:
        """Let the count number *position* be *count*."""
        os.pwrite(self._descriptor, self._FORM.pack(count), position * self._FORM.size)

    def read(self, position: int) -> int:
        """The count number *position*; 0 if it was never written."""
        data = os.pread(self._descriptor, self._FORM.size, position * self._FORM.size)
        return int(self._FORM.unpack(data)[0]) if len(data) == self._FORM.size else 0


class LateRanks:
    """Finds the ranks whose count of steps stands still.

    Args:
        timeout: seconds that a step may take; ``None`` for any.
        clock: to measure it with.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float]) -> None:
        self.timeout = timeout
        self._clock = clock
        self._since = clock()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its count, and since when

    def __call__(self, counts: Mapping[int, int]) -> list[int]:
        """The ranks among *counts* that have done no step for too long."""
        if self.timeout is None:
            return []
        now = self._clock()
        for rank, count in counts.items():
            before = self._seen.get(rank)
            if before is None or before[0] != count:
                self._seen[rank] = (count, self._since if before is None else now)
        return [rank for rank in counts if now - self._seen[rank][1] >= self.timeout]
