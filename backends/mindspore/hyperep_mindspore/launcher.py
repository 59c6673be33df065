# SPDX-License-Identifier: Apache-2.0
"""Starting MindSpore ranks without msrun: a scheduler and one worker process per rank, on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from hyperep.launch import Auxiliary, Launcher, LaunchPlan, RankProcess
from hyperep.launch.host_memory import keep_memory
from hyperep.launch.ports import free_port
from hyperep_mindspore.blas import VARIABLE, better_kernels

__all__ = ["MindSporeLauncher", "launcher"]

_SCHEDULER = "from mindspore.communication import init; init()"
"""With ``MS_ROLE=MS_SCHED`` this serves the workers and returns when the last of them has left."""
_JOIN_SECONDS = 120
"""How long the scheduler and the workers look for each other."""


class MindSporeLauncher(Launcher):
    """Sets the variables that msrun sets; see MindSpore's "dynamic cluster"."""

    def joined(self) -> bool:  # noqa: D102
        return os.environ.get("MS_ROLE") == "MS_WORKER"

    def plan(self, ranks: int) -> LaunchPlan:  # noqa: D102
        better = better_kernels()
        kernels = {} if better is None else {VARIABLE: better}
        if ranks == 1:
            return LaunchPlan(processes=(RankProcess(ranks=(0,), environment=kernels),))
        common = {
            **kernels,
            "MS_WORKER_NUM": str(ranks),
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(free_port()),
            "MS_TOPO_TIMEOUT": str(_JOIN_SECONDS),
            "RANK_SIZE": str(ranks),
            # Errors only: at the default level each rank reports how it looks for the scheduler.
            "GLOG_v": os.environ.get("GLOG_v", "3"),  # noqa: SIM112 - MindSpore spells it so
        }
        scheduler = Auxiliary(
            name="scheduler",
            command=(sys.executable, "-c", _SCHEDULER),
            environment={**common, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"},
        )
        workers = tuple(
            RankProcess(
                ranks=(rank,),
                environment={
                    **common,
                    "MS_ROLE": "MS_WORKER",
                    "MS_NODE_ID": str(rank),
                    "RANK_ID": str(rank),
                    "DEVICE_ID": str(rank),
                },
            )
            for rank in range(ranks)
        )
        return LaunchPlan(processes=workers, auxiliaries=(scheduler,))

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:  # noqa: D102
        keep_memory()  # NumPy's arrays on the CPU come from the C library
        return super().host(process, function, platform_name)

    def lost_port(self, report: str) -> bool:  # noqa: D102
        return "Failed to init the tcp server" in report or super().lost_port(report)


launcher = MindSporeLauncher()
