# SPDX-License-Identifier: Apache-2.0
"""``RankPool``: warm ranks, used again by one task after another and replaced after a failure.

Ranks that do not start are tried again: what a framework does at the start, such as meeting on ports and making groups,
may lose a race that says nothing of it. Ranks that fail twice in the same way have failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from hyperep.launch.failure import Shortfall
from hyperep.launch.launcher import Launcher
from hyperep.launch.world import World
from hyperep.platform.errors import RankFailure

__all__ = ["RankPool"]


class RankPool:
    """Runs tasks on a world that is made when it is first needed, and anew after a rank failed.

    Args:
        launcher: of the platform.
        platform_name: name of the platform.
        ranks: number of ranks.
        start_deadline: seconds in which every rank must have its platform.
        quiet: as for :class:`hyperep.launch.world.World`.
        starts: how often ranks are started at most until they run.
    """

    def __init__(
        self,
        launcher: Launcher,
        platform_name: str,
        ranks: int,
        *,
        start_deadline: float = 120.0,
        quiet: bool = True,
        starts: int = 3,
    ) -> None:
        self.ranks = ranks
        self.worlds_made = 0
        self.failed_starts: list[str] = []
        """Why ranks did not start, in one line, each time that they did at another try."""
        self.printed: list[dict[tuple[int, ...], str]] = []
        """What the ranks of each world printed that has ended, by the ranks of a process."""
        self._starts = starts
        self._make = functools.partial(World, launcher, platform_name, ranks, deadline=start_deadline, quiet=quiet)
        self._world: World | None = None

    def run(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        deadline: float | None = None,
        shortfall: Callable[[Any], Shortfall | None] | None = None,
    ) -> list[Any]:
        """Run a task on every rank and return the results by rank; arguments and errors are those of a world's."""
        if self._world is None or not self._world.alive:
            self.close()
            self._world = self._start()
            self.worlds_made += 1
        return self._world.run(program, arguments, deadline=deadline, shortfall=shortfall)

    def _start(self) -> World:
        failed: list[RankFailure] = []
        while True:
            try:
                world = self._make()
            except RankFailure as failure:
                failed.append(failure)
                if len(failed) == self._starts or _summary(failure) in map(_summary, failed[:-1]):
                    raise
            else:
                self.failed_starts += [str(failure).partition("\n")[0] for failure in failed]
                return world

    def close(self) -> None:
        """End the ranks; a further task would get new ones."""
        if self._world is not None:
            self._world.close()
            self.printed.append(self._world.printed)
            self._world = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _summary(failure: RankFailure) -> str:
    """What went wrong, whichever rank it was on."""
    first = failure.ends[0] if failure.ends else None
    return first.summary if first is not None and first.summary else str(failure).partition("\n")[0]
