# SPDX-License-Identifier: Apache-2.0
"""Real ranks for the tests: warm processes in one gloo world, each of which runs the functions that it is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hyperep_torch.launcher import TorchLauncher
from hyperep_torch.world import DEVICE_VARIABLE

from hyperep.launch import LaunchPlan
from hyperep.launch.pool import RankPool

DEADLINE = 60.0
"""Seconds that one function may take."""


class OnCpu(TorchLauncher):
    """Ranks on the CPU, also where there is a CUDA device, with one thread each."""

    def plan(self, ranks: int) -> LaunchPlan:
        added = {DEVICE_VARIABLE: "cpu", "OMP_NUM_THREADS": "1"}
        processes = super().plan(ranks).processes
        return LaunchPlan(
            processes=tuple(dataclasses.replace(p, environment={**p.environment, **added}) for p in processes)
        )


class Ranks:
    """A world of processes. ``run`` calls a function on every rank and returns the results in rank order."""

    def __init__(self, world_size: int) -> None:
        self._pool = RankPool(OnCpu(), "torch", world_size)

    def run(self, function: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """Call ``function(platform, *args)`` everywhere, which may take *deadline* seconds; it must be importable."""
        return self._pool.run("ranks:call", {"function": function, "args": args}, deadline=deadline)

    def stop(self) -> None:
        """End the processes."""
        self._pool.close()


def call(platform: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What each rank does."""
    return function(platform, *args)
