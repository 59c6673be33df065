# SPDX-License-Identifier: Apache-2.0
"""Start a function on every rank of a loopback world."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.launch.clock import RunningClock
from hyperep.launch.failure import End, RankEnd, rank_failure
from hyperep.launch.messages import raised
from hyperep.launch.places import code_of, place_of_frame
from hyperep.launch.steps import LateRanks, StepsOverdue, counting_steps, current_step_limit
from hyperep.loopback.exchange import CollectiveTimeout, Exchange, WorldEnded
from hyperep.loopback.platform import LoopbackPlatform
from hyperep.platform.errors import RankFailure

__all__ = ["LoopbackLauncher", "launcher", "run"]

_OWN = code_of(LoopbackPlatform)
_POLL = 0.2
_GRACE = 3.0
"""Seconds that the other ranks get to end after one has failed. A rank that stands in its own code cannot be ended: its
thread is left behind, and ends with the process."""


@dataclass
class _Rank:
    """What is known of one rank while it runs."""

    thread: threading.Thread | None = None
    steps: int = 0
    error: BaseException | None = None
    at: float = 0.0
    result: Any = None
    done: bool = False
    told: RankEnd | None = None
    """Where it stood when steps were overdue."""


def run(
    function: Callable[..., Any], world_size: int, *, deadline: float | None = None, timeout: float | None = None
) -> list[Any]:
    """Call ``function(platform)`` once per rank, each in a thread of its own, and return the results by rank.

    Args:
        function: called with this rank's :class:`LoopbackPlatform`, which is also the platform in scope there.
        world_size: number of ranks.
        deadline: seconds that a rank waits for the others in one collective; by default ``HYPEREP_TIMEOUT``, or ten
            minutes. Seconds in which the process is suspended do not count, here and in *timeout*.
        timeout: seconds from one :func:`hyperep.launch.step_done` of a rank to the next; by default any.

    Raises:
        RankFailure: a rank raised or is late. The others are ended; the message has that rank's traceback, and the
            error itself is the ``__cause__``. A rank that stands still in its own code keeps its thread.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: a world has at least one rank")
    exchange = Exchange(world_size, deadline)
    ranks = [_Rank() for _ in range(world_size)]

    def work(number: int) -> None:
        from hyperep.platform.selection import use_platform

        rank, counter = ranks[number], itertools.count(1)
        platform = LoopbackPlatform(number, exchange)

        def count() -> None:
            rank.steps = next(counter)

        try:
            with use_platform(platform), counting_steps(count):
                rank.result = function(platform)
        except BaseException as error:
            rank.error, rank.at = error, time.monotonic()
            exchange.fail(number, error)
        finally:
            rank.done = True
            exchange.end(number)

    for number, rank in enumerate(ranks):
        rank.thread = threading.Thread(target=work, args=(number,), name=f"loopback-rank-{number}", daemon=True)
    for rank in ranks:
        assert rank.thread is not None
        rank.thread.start()
    late = _wait(ranks, exchange, current_step_limit() if timeout is None else timeout)
    if late is not None or any(rank.error is not None for rank in ranks):
        raise _failure(ranks, late)
    return [rank.result for rank in ranks]


def _wait(ranks: list[_Rank], exchange: Exchange, timeout: float | None) -> StepsOverdue | None:
    """Wait until all ranks are done, or one has failed and the others had time to end; whether steps are overdue."""
    clock = RunningClock()
    late = LateRanks(timeout, clock)
    overdue, end = None, None
    while running := [number for number, rank in enumerate(ranks) if not rank.done]:
        thread = ranks[running[0]].thread
        assert thread is not None
        thread.join(_POLL)
        if end is None and (missed := late({number: ranks[number].steps for number in running})):
            overdue = StepsOverdue(missed, len(ranks), late.timeout or 0.0)
            for number in running:
                ranks[number].told = _standing(number, ranks[number])
            exchange.fail(missed[0], overdue)
        if end is None and (overdue is not None or any(rank.error is not None for rank in ranks)):
            end = clock() + _GRACE
        if end is not None and clock() >= end:
            break
    return overdue


def _failure(ranks: list[_Rank], late: StepsOverdue | None) -> RankFailure:
    ends, errors = [], {}
    waited = next((rank.error for rank in ranks if isinstance(rank.error, CollectiveTimeout)), None)
    for number, rank in enumerate(ranks):
        if rank.told is not None:  # where it stood when steps were overdue; what it met since is of our making
            ends.append(rank.told)
        elif rank.error is not None:
            message = raised(number, rank.error, _OWN)
            facts: dict[str, Any] = {"at": _order(rank), "summary": message.summary, "place": message.place}
            ends.append(RankEnd(ranks=(number,), end=End.RAISED, error=message, **facts))
            errors[number] = rank.error
        elif rank.done:
            ends.append(RankEnd(ranks=(number,), end=End.FINISHED, result=rank.result))
        elif waited is None:
            ends.append(_standing(number, rank))
        else:
            ends.append(dataclasses.replace(_standing(number, rank), end=End.HUNG, summary=str(waited)))
    failure = rank_failure("" if late is None else str(late), ends, {})
    failure.__cause__ = errors.get(-1 if failure.rank is None else failure.rank, late or waited)
    return failure


def _order(rank: _Rank) -> float:
    """When a rank failed; after all others one that was ended because of them, or has waited for them."""
    return rank.at + 1e9 * (isinstance(rank.error, CollectiveTimeout) + 2 * isinstance(rank.error, WorldEnded))


def _standing(number: int, rank: _Rank) -> RankEnd:
    """A rank that runs, and where."""
    assert rank.thread is not None
    frame = sys._current_frames().get(rank.thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    return RankEnd(ranks=(number,), end=End.RUNNING, place=place_of_frame(frame, _OWN), stack=stack)


class LoopbackLauncher(Launcher):
    """Ranks are threads, so a world of any size is one process, and a program runs right here."""

    threads = True

    def joined(self) -> bool:  # noqa: D102
        return False

    def plan(self, ranks: int) -> LaunchPlan:  # noqa: D102
        return LaunchPlan(processes=(RankProcess(ranks=tuple(range(ranks))),))

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:  # noqa: D102
        return run(function, len(process.ranks))


launcher = LoopbackLauncher()
