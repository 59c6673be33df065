# SPDX-License-Identifier: Apache-2.0
"""Waiting for what the ranks of a world have to say, and noticing the ones that will say nothing any more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from hyperep.launch.children import Helper, Hosted
from hyperep.launch.clock import RunningClock
from hyperep.launch.failure import End, RankEnd, Shortfall, rank_failure
from hyperep.launch.messages import Finished, Raised, Ready
from hyperep.launch.places import place_in_dump, place_of_crash
from hyperep.launch.steps import LateRanks, StepsOverdue
from hyperep.platform.errors import RankFailure

__all__ = ["STOPPED_SECONDS", "Collection"]

STOPPED_SECONDS = 8.0
"""Seconds after which a rank that is stopped (SIGSTOP, ...) is taken for one that will not go on."""
_POLL = 0.2
_GRACE = 1.5
"""Seconds after the first failure in which other ranks may still say what they met."""
_STRAGGLERS = 3.0
"""Seconds that the other ranks get after a result that calls for hurry."""


class Collection:
    """What was heard of the ranks since they got something to do.

    Args:
        processes: of the ranks.
        auxiliaries: that they need beside them.
        threads: rank -> the thread that it is, as far as it has said so.
    """

    def __init__(
        self, processes: Sequence[Hosted], auxiliaries: Sequence[Helper], threads: Mapping[int, int] | None = None
    ) -> None:
        self._processes = processes
        self._auxiliaries = auxiliaries
        self._threads = threads or {}
        self._ranks = sum(len(process.ranks) for process in processes)
        self._clock = RunningClock()
        self._heard: dict[int, Any] = {}
        self._short: dict[int, Shortfall] = {}
        self._dead: dict[int, float] = {}  # position of a process -> when its end was noticed
        self._stopped: dict[int, float] = {}  # position of a process -> since when it was seen to be stopped

    def of(
        self,
        kind: type[Ready] | type[Finished],
        what: str,
        *,
        deadline: float | None = None,
        timeout: float | None = None,
        shortfall: Callable[[Any], Shortfall | None] | None = None,
    ) -> dict[int, Any]:
        """Wait until each rank has sent a message of *kind*, and return them by rank.

        Args:
            kind: of message.
            what: the ranks do, for people.
            deadline: seconds for all of it.
            timeout: seconds from one step of a rank to the next.
            shortfall: as for :meth:`hyperep.launch.world.World.run`.

        Raises:
            RankFailure: a rank raised, died, was stopped or is late.
        """
        end = math.inf if deadline is None else self._clock() + deadline
        late = LateRanks(timeout, self._clock)
        headline = "" if deadline is None else f"not done within the deadline of {deadline:g} s: {what}"
        failed = False
        while len(self._heard) < self._ranks:
            for message in self._receive(min(_POLL, max(0.0, end - self._clock()))):
                if isinstance(message, (kind, Raised)):
                    self._heard[message.rank] = message
                    if isinstance(message, Finished) and shortfall is not None and (short := shortfall(message.result)):
                        self._short[message.rank] = short
                        end = min(end, self._clock() + _STRAGGLERS)
            self._look()
            if not failed and (reason := self._reason()) is not None:
                failed, end = True, min(end, self._clock() + _GRACE)
                headline = reason or headline
            if not failed and (overdue := late(self._counts())):
                raise self._failure(str(StepsOverdue(overdue, self._ranks, late.timeout or 0.0)))
            if self._clock() >= end or self._stopped_for_good() or (failed and self._all_told()):
                raise self._failure(headline)
        if failed:
            raise self._failure(headline)
        return self._heard

    def _receive(self, seconds: float) -> list[Any]:
        """The messages that come within *seconds*, one of each process."""
        channels = {p.channel: i for i, p in enumerate(self._processes) if i not in self._dead}
        messages = []
        for ready in wait(list(channels), timeout=seconds):
            channel = cast("Connection[Any, Any]", ready)
            try:
                messages.append(channel.recv())
            except (EOFError, OSError):
                self._dead[channels[channel]] = time.monotonic()
        return messages

    def _look(self) -> None:
        """See which processes live, and which of them run."""
        for position, process in enumerate(self._processes):
            if position in self._dead:
                continue
            if process.returncode() is not None and not process.channel.poll():
                self._dead[position] = time.monotonic()
            elif process.stopped_by():
                self._stopped.setdefault(position, self._clock())
            else:
                self._stopped.pop(position, None)

    def _reason(self) -> str | None:
        """Why the rest cannot succeed: a headline, empty if the ranks' own ends tell it; ``None`` if they can."""
        ended = next((a for a in self._auxiliaries if a.returncode() not in (None, 0)), None)
        if ended is not None:
            return f"{ended.name!r}, which the ranks need beside them, ended with status {ended.returncode()}"
        lost = any(self._missing(position) for position in self._dead)
        return "" if lost or any(isinstance(m, Raised) for m in self._heard.values()) else None

    def _counts(self) -> dict[int, int]:
        """Steps of the ranks that are not done."""
        return {r: n for p in self._processes for r, n in p.steps().items() if r not in self._heard}

    def _missing(self, position: int) -> tuple[int, ...]:
        return tuple(rank for rank in self._processes[position].ranks if rank not in self._heard)

    def _stopped_for_good(self) -> bool:
        now = self._clock()
        return any(now - since >= STOPPED_SECONDS and self._missing(i) for i, since in self._stopped.items())

    def _all_told(self) -> bool:
        return all(position in self._dead or not self._missing(position) for position in range(len(self._processes)))

    def _failure(self, headline: str) -> RankFailure:
        for position, process in enumerate(self._processes):
            if self._missing(position) and position not in self._dead and not process.stopped_by():
                process.ask_for_stacks()
        ends = [end for position in range(len(self._processes)) for end in self._ends(position)]
        notes = {f"output of {a.name}": a.printed() for a in self._auxiliaries if a.returncode() not in (None, 0)}
        return rank_failure(headline, ends, notes)

    def _ends(self, position: int) -> list[RankEnd]:
        """How the ranks of one process ended."""
        process = self._processes[position]
        ends = []
        for rank in process.ranks:
            message = self._heard.get(rank)
            if isinstance(message, Raised):
                facts: dict[str, Any] = {"at": message.at, "summary": message.summary, "place": message.place}
                ends.append(RankEnd(ranks=(rank,), end=End.RAISED, error=message, **facts))
            elif message is not None and (short := self._short.get(rank)) is not None:
                facts = {"at": message.at, "summary": short.summary, "place": short.place, "stack": short.detail}
                ends.append(RankEnd(ranks=(rank,), end=End.FAILED, result=message.result, **facts))
            elif message is not None:
                ends.append(RankEnd(ranks=(rank,), end=End.FINISHED, result=getattr(message, "result", None)))
        missing = self._missing(position)
        if not missing:
            return ends
        stack, own = process.stacks(), process.own
        doings = {rank: process.doing(rank) for rank in missing}
        if position in self._dead:
            told = "\n".join(t for t in (stack, process.printed()) if t)
            summary, outside = process.epitaph()
            facts = {"at": self._dead[position], "summary": summary, "outside": outside, "stack": told}
            facts |= {"place": place_of_crash(stack, own), "doing": _of_several(doings)}
            return [*ends, RankEnd(ranks=missing, end=End.DIED, **facts)]
        if signal := process.stopped_by():
            facts = {"at": time.monotonic(), "summary": f"by {signal}, from outside; it was not continued"}
            return [*ends, RankEnd(ranks=missing, end=End.STOPPED, doing=_of_several(doings), **facts)]
        for rank in missing:
            place = place_in_dump(stack, self._threads.get(rank), own)
            ends.append(RankEnd(ranks=(rank,), end=End.RUNNING, place=place, stack=stack, doing=doings[rank]))
        return ends


def _of_several(doings: Mapping[int, str]) -> str:
    """What the ranks of one process said last."""
    said = {rank: what for rank, what in doings.items() if what}
    return next(iter(said.values()), "") if len(doings) == 1 else "; ".join(f"rank {r}: {w}" for r, w in said.items())
