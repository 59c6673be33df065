# SPDX-License-Identifier: Apache-2.0
"""Real ranks for the tests: warm processes in one gloo world, each of which runs the functions that it is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from hyperep_torch.launcher import TorchLauncher
from hyperep_torch.world import DEVICE_VARIABLE

from hyperep.launch import LaunchPlan
from hyperep.launch.pool import RankPool

DEADLINE = 60.0
"""Seconds that one function may take."""

GROUPS = 40
"""Process groups, with which ranks make place for new ones: each has threads of gloo's, which wake up a hundred times a
second as long as anything of the group is left, so that hundreds of groups take a core."""


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
        answers = self._pool.run("ranks:call", {"function": function, "args": args}, deadline=deadline)
        if max(groups for _, groups in answers) > GROUPS:
            self._pool.close()
        return [result for result, _ in answers]

    def stop(self) -> None:
        """End the processes."""
        self._pool.close()


def call(platform: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, int]:
    """What each rank does; and how many process groups it has then."""
    return function(platform, *args), len(dist.distributed_c10d._world.pg_map)
