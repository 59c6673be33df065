# SPDX-License-Identifier: Apache-2.0
"""``RankPool``: warm ranks, used again by one task after another and replaced after a failure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from hyperep.launch.failure import Shortfall
from hyperep.launch.launcher import Launcher
from hyperep.launch.world import World

__all__ = ["RankPool"]


class RankPool:
    """Runs tasks on a world that is made when it is first needed, and anew after a rank failed.

    Args:
        launcher: of the platform.
        platform_name: name of the platform.
        ranks: number of ranks.
        start_deadline: seconds in which every rank must have its platform.
        quiet: as for :class:`hyperep.launch.world.World`.
    """

    def __init__(
        self, launcher: Launcher, platform_name: str, ranks: int, *, start_deadline: float = 120.0, quiet: bool = True
    ) -> None:
        self.ranks = ranks
        self.worlds_made = 0
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
            self._world = self._make()
            self.worlds_made += 1
        return self._world.run(program, arguments, deadline=deadline, shortfall=shortfall)

    def close(self) -> None:
        """End the ranks; a further task would get new ones."""
        if self._world is not None:
            self._world.close()
            self._world = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
