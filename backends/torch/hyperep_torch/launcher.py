# SPDX-License-Identifier: Apache-2.0
"""Ranks of ``torch.distributed`` on this machine, one process each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.launch.tasks import task_of

__all__ = ["TorchLauncher", "launcher"]

_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
"""The network interface that reaches this machine and nothing else."""


class TorchLauncher(Launcher):
    """One process a rank. They meet by a file, so that no port is needed and nobody else can reach the place."""

    def joined(self) -> bool:
        """Whether torchrun, or what speaks like it, or srun or mpirun started this process as one of several."""
        return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or task_of(os.environ) is not None

    def plan(self, ranks: int) -> LaunchPlan:
        """One process a rank.

        Raises:
            ValueError: the environment asks for devices that are not there, or not as many.
        """
        _require_devices(os.environ.get("HYPEREP_TORCH_DEVICE"), ranks)
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            # All ranks are on this machine, so what they connect by need not be reached from others. What the user has
            # set for launches over several machines is not meant for this one.
            "GLOO_SOCKET_IFNAME": _LOOPBACK,
            "NCCL_SOCKET_IFNAME": _LOOPBACK,
        }
        return LaunchPlan(
            processes=tuple(
                RankProcess(ranks=(rank,), environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(ranks)
            )
        )

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:  # noqa: D102
        from hyperep_torch.host_memory import keep_memory

        keep_memory()
        return super().host(process, function, platform_name)


def _require_devices(requested: str | None, ranks: int) -> None:
    """Say what each rank would say, before any of them is started."""
    if requested:
        from hyperep_torch.device import choose_kind

        choose_kind(requested).require(ranks)


launcher = TorchLauncher()
