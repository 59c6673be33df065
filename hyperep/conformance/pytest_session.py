# SPDX-License-Identifier: Apache-2.0
"""What one pytest run of the suite keeps: the target, the world that is up, the results so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hyperep.conformance.catalogue import find, requirements
from hyperep.conformance.report import Result
from hyperep.conformance.suite import described, make_report
from hyperep.conformance.target import find_target
from hyperep.conformance.world_run import WorldRun
from hyperep.platform.errors import PlatformError
from hyperep.writable import require_writable_file

__all__ = ["SuiteSession", "selection_of"]


class SuiteSession:
    """The suite on one platform, driven by pytest's items; one world is up at a time."""

    def __init__(self, config: pytest.Config) -> None:
        name = config.getoption("--hyperep-platform")
        try:
            self.target = find_target(name)
        except (PlatformError, ValueError) as error:
            raise pytest.UsageError(f"--hyperep-platform={name}: {error}") from None
        self.world_sizes = _world_sizes(config.getoption("--hyperep-world-size"))
        self.seed = config.getoption("--hyperep-seed")
        self._deadline = config.getoption("--hyperep-deadline")
        self._report = config.getoption("--hyperep-report")
        if self._report:
            try:
                require_writable_file(Path(self._report), "--hyperep-report")
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None
        self._world: WorldRun | None = None
        self._description: Mapping[str, object] = {}
        self._results: list[Result] = []
        self._began = time.monotonic()

    def run(self, ranks: int, id: str) -> Result:
        """Check one requirement, on a new world if the size is another than before."""
        if self._world is None or self._world.ranks != ranks:
            self._end_world()
            self._world = WorldRun(self.target, ranks, seed=self.seed, deadline=self._deadline)
        self._results.append(self._world.run(find(id)))
        return self._results[-1]

    def finish(self) -> None:
        """End the ranks; write the report, if one was asked for and something was run."""
        self._end_world()
        if self._report and self._results:
            seconds = time.monotonic() - self._began
            selection = selection_of(self._results, self.world_sizes)
            facts = (self.target, self._description, self.world_sizes, self.seed, seconds, self._results)
            make_report(*facts, selection=selection).save(self._report)

    def _end_world(self) -> None:
        if self._world is not None:
            self._description = described(self._world) or self._description
            self._world.close()
            self._world = None


def selection_of(results: Sequence[Result], world_sizes: Sequence[int]) -> tuple[str, ...] | None:
    """What pytest was confined to, by -k, -x or otherwise: the ids that were run in every world; ``None`` for all."""
    ran = {(result.id, result.ranks) for result in results}
    whole = tuple(id for id in requirements() if all((id, ranks) in ran for ranks in world_sizes))
    return None if len(whole) == len(requirements()) else whole


def _world_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise pytest.UsageError(f"--hyperep-world-size={text}: give numbers of ranks such as 1,2,3,4")
    return sizes
