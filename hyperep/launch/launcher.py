# SPDX-License-Identifier: Apache-2.0
"""What a platform's plugin says about starting ranks: a ``Launcher``, named in its ``PlatformSpec``.

A *program* is a ``"module:function"`` string. Every rank calls ``function(platform, **arguments)`` with its own
platform, which is also the platform in scope; the value that rank 0 returns is the value of the run. Arguments and
results are plain data (what ``json`` can hold).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Auxiliary", "LaunchPlan", "Launcher", "RankProcess"]


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """A process to start, and the ranks that live in it: one, or several where ranks are threads."""

    ranks: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set on top of the parent's."""


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A process that ranks need beside them, such as a scheduler: started before them and ended after them."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The processes of one launch."""

    processes: tuple[RankProcess, ...]
    auxiliaries: tuple[Auxiliary, ...] = ()


class Launcher(ABC):
    """How ranks of one platform come to life. An instance is pickled into the processes that it plans."""

    @abstractmethod
    def joined(self) -> bool:
        """Whether this process already is a rank of somebody's launch (torchrun, msrun, ...)."""

    @abstractmethod
    def plan(self, ranks: int) -> LaunchPlan:
        """The processes that make a world of *ranks* ranks on this machine, with ports that are free now."""

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:
        """Inside a started process: call *function* with the platform of each of its ranks; return the results."""
        from hyperep.platform.selection import get_platform, use_platform

        platform = get_platform(platform_name)
        with use_platform(platform):
            return [function(platform)]

    def run(
        self,
        platform_name: str,
        program: str,
        arguments: Mapping[str, Any],
        ranks: int,
        *,
        deadline: float | None = None,
    ) -> Any:
        """Run *program* on a new world of *ranks* ranks and return what rank 0 returned.

        Raises:
            RankFailure: a rank raised, died, never started, or was not done by *deadline* (seconds; ``None`` waits as
                long as the ranks live). It names the rank and holds its traceback; no process is left behind.
        """
        from hyperep.launch.processes import run_processes

        return run_processes(self, platform_name, program, arguments, ranks, deadline=deadline)
