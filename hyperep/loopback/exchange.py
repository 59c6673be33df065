# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a loopback world, which are threads, hand data to one another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.launch.clock import RunningClock
from hyperep.launch.timeout import step_timeout

__all__ = ["CollectiveTimeout", "Exchange", "WorldEnded"]


_POLL = 1.0
"""Seconds between two looks at the clock: it must notice that the process was suspended."""


class CollectiveTimeout(RuntimeError):
    """A rank waits for others to issue the same collective, and they have not, or never will."""


class WorldEnded(RuntimeError):
    """Another rank failed, so this one cannot go on."""


@dataclass
class _Meeting:
    """One collective of one group: what every rank brought, and what it was called."""

    operations: dict[int, str] = field(default_factory=dict)
    payloads: dict[int, Any] = field(default_factory=dict)
    taken: int = 0


class Exchange:
    """The meeting place of a world: the k-th collective of a group on one rank meets the k-th on the others.

    Posting never blocks; collecting waits until all members have posted, a rank has failed or ended without posting,
    or the deadline is over.
    """

    def __init__(self, world_size: int, deadline: float | None = None) -> None:
        """Make the meeting place of *world_size* ranks, which wait at most *deadline* seconds for each other.

        By default as long as ``HYPEREP_TIMEOUT`` says. Seconds in which the process is suspended do not count.
        """
        self.world_size = world_size
        self.deadline = step_timeout() if deadline is None else deadline
        self._changed = threading.Condition()
        self._meetings: dict[Hashable, _Meeting] = {}
        self._failure: tuple[int, BaseException] | None = None
        self._ended: set[int] = set()

    def post(
        self, group: Sequence[int], sequence: Hashable, rank: int, operation: str, payload: Any
    ) -> Callable[[], list[Any]]:
        """Bring *payload* to the group's collective number *sequence*; return what collects everyone's, by rank."""
        members = tuple(group)
        key = (members, sequence)
        with self._changed:
            meeting = self._meetings.setdefault(key, _Meeting())
            meeting.operations[rank] = operation
            meeting.payloads[rank] = payload
            self._changed.notify_all()
        return lambda: self._collect(key, rank)

    def _collect(self, key: tuple[tuple[int, ...], Hashable], rank: int) -> list[Any]:
        members = key[0]
        waited = RunningClock()
        with self._changed:
            meeting = self._meetings[key]
            while len(meeting.payloads) < len(members):
                if self._failure is not None:
                    failed, error = self._failure
                    raise WorldEnded(f"rank {rank} stopped: rank {failed} failed with {type(error).__name__}: {error}")
                absent = set(members) - set(meeting.payloads)
                remaining = self.deadline - waited()
                if remaining <= 0 or absent & self._ended:
                    why = (
                        f"{self.deadline:g} s are over" if remaining <= 0 else f"ranks {sorted(self._ended)} have ended"
                    )
                    raise CollectiveTimeout(
                        f"rank {rank} in {meeting.operations[rank]!r} of group {members}: {why}, and ranks "
                        f"{sorted(absent)} never issued it; collectives must be issued in the same order on all ranks"
                    )
                self._changed.wait(min(remaining, _POLL))
            meeting.taken += 1
            if meeting.taken == len(members):
                del self._meetings[key]
        if len(set(meeting.operations.values())) > 1:
            raise RuntimeError(f"ranks of group {members} issued different collectives: {meeting.operations}")
        return [meeting.payloads[member] for member in members]

    def end(self, rank: int) -> None:
        """Say that *rank* issues nothing more: who waits for it need not wait for the deadline."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()

    def fail(self, rank: int, error: BaseException) -> None:
        """Say that *rank* failed; every rank that waits, now or later, ends with that error. The first one counts."""
        with self._changed:
            if self._failure is None:
                self._failure = (rank, error)
            self._changed.notify_all()
