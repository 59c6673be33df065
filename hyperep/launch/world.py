# SPDX-License-Identifier: Apache-2.0
"""``World``: the processes of one launch, alive until it is closed or one of its ranks fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from hyperep.launch.children import Helper, Hosted
from hyperep.launch.failure import End, RankEnd, rank_failure
from hyperep.launch.launcher import Launcher
from hyperep.launch.messages import Finished, Hello, Raised, Ready, Task
from hyperep.platform.errors import RankFailure

__all__ = ["World"]

_POLL = 0.2
_GRACE = 1.5
"""Seconds after the first failure in which other ranks may still say what they met."""
_STRAGGLERS = 3.0
"""Seconds that the other ranks get after a result that calls for hurry."""
_FAREWELL = 5.0
"""Seconds that processes get to end by themselves when the world is closed."""


class World:
    """A world of ranks that runs one task after another on all of them.

    The thread that makes a world must live as long as it does: the kernel ends the processes with that thread.

    Args:
        launcher: of the platform; it is pickled into the rank processes.
        platform_name: name of the platform.
        ranks: number of ranks.
        deadline: seconds in which every rank must have its platform.
        quiet: keep what the ranks print, and show the end of it in errors only.

    Raises:
        RankFailure: a rank failed to start; nothing is left behind.
    """

    def __init__(
        self, launcher: Launcher, platform_name: str, ranks: int, *, deadline: float | None = None, quiet: bool = False
    ) -> None:
        if ranks < 1:
            raise ValueError(f"ranks={ranks}: a world has at least one rank")
        self.ranks = ranks
        self.alive = True
        self._processes: list[Hosted] = []
        self._auxiliaries: list[Helper] = []
        try:
            plan = launcher.plan(ranks)
            self._auxiliaries += [Helper(auxiliary) for auxiliary in plan.auxiliaries]
            for process in plan.processes:
                self._processes.append(
                    Hosted(process, Hello(launcher=launcher, platform_name=platform_name, process=process), quiet)
                )
            self._collect(Ready, deadline, "start")
        except BaseException:
            self._kill()
            raise

    def run(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        deadline: float | None = None,
        hurry: Callable[[Any], bool] | None = None,
    ) -> list[Any]:
        """Run ``function(platform, **arguments)`` on every rank and return the results by rank.

        Args:
            program: ``"module:function"``.
            arguments: passed by keyword; anything that can be pickled.
            deadline: seconds; ``None`` waits as long as the ranks live.
            hurry: called with each rank's result; once it says yes, the other ranks get a few seconds only. For
                results from which one can tell that this rank may have left the others waiting.

        Raises:
            RankFailure: as for :meth:`hyperep.launch.Launcher.run`. The world is ended then.
        """
        if not self.alive:
            raise ValueError("this world has ended; make another one")
        try:
            for process in self._processes:
                process.send(Task(program=program, arguments=arguments))
            finished = self._collect(Finished, deadline, program, hurry)
        except BaseException:
            self._kill()
            raise
        return [finished[rank].result for rank in range(self.ranks)]

    def close(self) -> None:
        """End the ranks in an orderly way, then whatever is left of the processes. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        for process in self._processes:
            process.send(None)
        end = time.monotonic() + _FAREWELL
        for child in (*self._processes, *self._auxiliaries):
            child.wait(end)
        self._kill()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(
        self,
        kind: type[Ready] | type[Finished],
        deadline: float | None,
        what: str,
        hurry: Callable[[Any], bool] | None = None,
    ) -> dict[int, Any]:
        """Wait until each rank has sent a message of *kind*."""
        began = time.monotonic()
        end = math.inf if deadline is None else began + deadline
        heard: dict[int, Any] = {}
        dead: dict[int, float] = {}  # position of a process -> when its end was noticed
        failed = False
        headline = f"not done within the deadline of {deadline:g} s: {what}" if deadline is not None else ""
        while len(heard) < self.ranks:
            channels = {p.channel: i for i, p in enumerate(self._processes) if i not in dead}
            for ready in wait(list(channels), timeout=max(0.0, min(_POLL, end - time.monotonic()))):
                channel = cast("Connection[Any, Any]", ready)
                position = channels[channel]
                try:
                    message: Any = channel.recv()
                except (EOFError, OSError):
                    dead[position] = time.monotonic()
                    continue
                if isinstance(message, (kind, Raised)):
                    heard[message.rank] = message
                    if hurry is not None and isinstance(message, Finished) and hurry(message.result):
                        end = min(end, time.monotonic() + _STRAGGLERS)
            for position, process in enumerate(self._processes):
                if position not in dead and process.returncode() is not None and not process.channel.poll():
                    dead[position] = time.monotonic()
            lost = [position for position in dead if not all(rank in heard for rank in self._processes[position].ranks)]
            ended = next((a for a in self._auxiliaries if a.returncode() not in (None, 0)), None)
            if not failed and (lost or ended or any(isinstance(m, Raised) for m in heard.values())):
                failed = True
                end = min(end, time.monotonic() + _GRACE)
                headline = (
                    f"{ended.name!r}, which the ranks need beside them, ended with status {ended.returncode()}"
                    if ended
                    else headline
                )
            if time.monotonic() >= end or (failed and self._all_told(heard, dead)):
                raise self._failure(headline, heard, dead)
        if failed:
            raise self._failure(headline, heard, dead)
        return heard

    def _all_told(self, heard: Mapping[int, Any], dead: Mapping[int, float]) -> bool:
        return all(i in dead or all(r in heard for r in p.ranks) for i, p in enumerate(self._processes))

    def _failure(self, headline: str, heard: Mapping[int, Any], dead: Mapping[int, float]) -> RankFailure:
        silent = [i for i, p in enumerate(self._processes) if any(rank not in heard for rank in p.ranks)]
        for position in silent:
            self._processes[position].ask_for_stacks()
        ends: list[RankEnd] = []
        for position, process in enumerate(self._processes):
            for rank in process.ranks:
                if isinstance(message := heard.get(rank), Raised):
                    ends.append(
                        RankEnd(ranks=(rank,), end=End.RAISED, at=message.at, summary=message.summary, error=message)
                    )
                elif message is not None:
                    ends.append(RankEnd(ranks=(rank,), end=End.FINISHED, result=getattr(message, "result", None)))
            missing = tuple(rank for rank in process.ranks if rank not in heard)
            if missing and position in dead:
                told = "\n".join(t for t in (process.stacks(), process.printed()) if t)
                ends.append(
                    RankEnd(ranks=missing, end=End.DIED, at=dead[position], summary=process.epitaph(), stack=told)
                )
            elif missing:
                ends.append(RankEnd(ranks=missing, end=End.RUNNING, stack=process.stacks()))
        notes = {f"output of {a.name}": a.printed() for a in self._auxiliaries if a.returncode() not in (None, 0)}
        return rank_failure(headline, ends, notes)

    def _kill(self) -> None:
        self.alive = False
        for child in (*self._processes, *self._auxiliaries):
            child.kill()
        self._processes, self._auxiliaries = [], []
