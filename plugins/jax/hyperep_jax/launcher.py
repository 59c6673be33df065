# SPDX-License-Identifier: Apache-2.0
"""Starting JAX processes on this machine, one a rank."""

from __future__ import annotations

import os

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.launch.ports import free_port

__all__ = ["ADDRESS", "RANK", "RANKS", "JaxLauncher", "launcher"]

ADDRESS, RANK, RANKS = "HYPEREP_JAX_COORDINATOR", "HYPEREP_JAX_RANK", "HYPEREP_JAX_RANKS"
"""Environment variables by which a rank finds the others: JAX itself has none for processes on one machine."""


class JaxLauncher(Launcher):
    """One process a rank; rank 0 holds the coordinator."""

    def joined(self) -> bool:
        """Whether this process is a rank already."""
        return RANKS in os.environ

    def plan(self, ranks: int) -> LaunchPlan:
        """Processes that find one another on a free port."""
        shared = {ADDRESS: f"127.0.0.1:{free_port()}", RANKS: str(ranks), "JAX_PLATFORMS": "cpu"}
        return LaunchPlan(
            processes=tuple(RankProcess(ranks=(r,), environment={**shared, RANK: str(r)}) for r in range(ranks))
        )


launcher = JaxLauncher()
