# SPDX-License-Identifier: Apache-2.0
"""What a platform's plugin says about starting ranks: a ``Launcher``, named in its ``PlatformSpec``.

A launcher describes; it starts nothing. :func:`hyperep.launch.run_on_ranks` starts what it describes, and ends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from hyperep.launch.plan import LaunchPlan, RankProcess
from hyperep.launch.ports import port_was_taken

__all__ = ["MEETING_VARIABLE", "Launcher"]

MEETING_VARIABLE = "HYPEREP_MEETING"
"""Environment variable of every process of a started world: a folder that nobody else can read, where ranks can meet
by files. A world has one of its own, which is gone when it ends."""


class Launcher(ABC):
    """How ranks of one platform come to life. An instance is pickled into the processes that it plans."""

    threads = False
    """Whether ranks are threads, so that a world of any size can live in the process that asks for it."""

    @abstractmethod
    def joined(self) -> bool:
        """Whether this process already is a rank of somebody's launch (torchrun, msrun, ...)."""

    @abstractmethod
    def plan(self, ranks: int) -> LaunchPlan:
        """The processes that make a world of *ranks* ranks on this machine.

        They must listen on this machine's loopback address alone. Where they meet on a port, take one that is free
        now: should somebody else have it when the ranks want it, another plan is asked for.
        """

    def lost_port(self, report: str) -> bool:
        """Whether *report*, of ranks that did not start, says that somebody else had a port of the plan."""
        return port_was_taken(report)

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:
        """Inside a started process: call *function* with the platform of each of its ranks; return the results."""
        from hyperep.platform.selection import get_platform, use_platform

        platform = get_platform(platform_name)
        with use_platform(platform):
            return [function(platform)]
