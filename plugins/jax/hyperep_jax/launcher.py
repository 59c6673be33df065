# SPDX-License-Identifier: Apache-2.0
"""Starting JAX processes on this machine, one a rank."""

from __future__ import annotations

import os
import socket

from hyperep.launch import Launcher, LaunchPlan, RankProcess

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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {ADDRESS: f"127.0.0.1:{free.getsockname()[1]}", RANKS: str(ranks), "JAX_PLATFORMS": "cpu"}
        return LaunchPlan(
            processes=tuple(RankProcess(ranks=(r,), environment={**shared, RANK: str(r)}) for r in range(ranks))
        )


launcher = JaxLauncher()
