# SPDX-License-Identifier: Apache-2.0
"""``World``: the processes of one launch, alive until it is closed or one of its ranks fails."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from hyperep.launch.children import Helper, Hosted
from hyperep.launch.collect import Collection
from hyperep.launch.failure import Shortfall
from hyperep.launch.launcher import MEETING_VARIABLE, Launcher
from hyperep.launch.messages import Finished, Hello, Ready, Task
from hyperep.launch.plan import LaunchPlan
from hyperep.platform.errors import RankFailure

__all__ = ["World"]

_FAREWELL = 5.0
"""Seconds that processes get to end by themselves when the world is closed."""
_PRINTED = 100_000
"""Characters kept of what a process printed: the last ones."""
_PLANS = 3
"""Plans that are tried, one after the other, where the port of one was lost to somebody else."""


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
        self.alive = False
        self.printed: dict[tuple[int, ...], str] = {}
        """What the ranks of each process printed, if that was kept; known when the world has ended."""
        self._processes: list[Hosted] = []
        self._auxiliaries: list[Helper] = []
        self._meeting = ""
        self._threads: Mapping[int, int] = {}
        for plan in range(1, _PLANS + 1):
            try:
                self._start(launcher, platform_name, launcher.plan(ranks), deadline, quiet)
                return
            except BaseException as error:
                self._kill()
                # A port that was free when the plan was made is nobody's promise: losing it says nothing of the ranks.
                if plan == _PLANS or not isinstance(error, RankFailure) or not launcher.lost_port(error.details):
                    raise

    def run(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        deadline: float | None = None,
        timeout: float | None = None,
        shortfall: Callable[[Any], Shortfall | None] | None = None,
    ) -> list[Any]:
        """Run ``function(platform, **arguments)`` on every rank and return the results by rank.

        Args:
            program: ``"module:function"``.
            arguments: passed by keyword; anything that can be pickled.
            deadline: seconds; ``None`` waits as long as the ranks live.
            timeout: seconds from one :func:`hyperep.launch.step_done` of a rank to the next, or to its result.
            shortfall: called with each rank's result; says what the result says is wrong. Once one is, the other
                ranks get a few seconds only, for this rank may have left them waiting.

        Raises:
            RankFailure: as for :func:`hyperep.launch.run_on_ranks`. The world is ended then.
        """
        if not self.alive:
            raise ValueError("this world has ended; make another one")
        try:
            for process in self._processes:
                process.send(Task(program=program, arguments=arguments))
            collection = Collection(self._processes, self._auxiliaries, self._threads)
            finished = collection.of(Finished, program, deadline=deadline, timeout=timeout, shortfall=shortfall)
        except BaseException:
            self._kill()
            raise
        return [finished[rank].result for rank in range(self.ranks)]

    def close(self) -> None:
        """End the ranks in an orderly way, then whatever is left of the processes. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        try:
            for process in self._processes:
                process.send(None)
            end = time.monotonic() + _FAREWELL
            for child in (*self._processes, *self._auxiliaries):
                child.wait(end)
        finally:
            self._kill()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self, launcher: Launcher, platform_name: str, plan: LaunchPlan, deadline: float | None, quiet: bool
    ) -> None:
        self._meeting = tempfile.mkdtemp(prefix="hyperep-")  # for its owner's eyes only
        shared = {MEETING_VARIABLE: self._meeting}
        self._auxiliaries += [Helper(auxiliary, shared) for auxiliary in plan.auxiliaries]
        for process in plan.processes:
            hello = Hello(launcher=launcher, platform_name=platform_name, process=process)
            self._processes.append(Hosted(process, hello, quiet, shared))
        ready = Collection(self._processes, self._auxiliaries).of(Ready, "start", deadline=deadline)
        self._threads = {rank: message.thread for rank, message in ready.items()}
        self.alive = True

    def _kill(self) -> None:
        self.alive = False
        for process in self._processes:
            self.printed[process.ranks] = process.printed(_PRINTED)
        for child in (*self._processes, *self._auxiliaries):
            child.kill()
        self._processes, self._auxiliaries = [], []
        if self._meeting:
            shutil.rmtree(self._meeting, ignore_errors=True)
            self._meeting = ""
