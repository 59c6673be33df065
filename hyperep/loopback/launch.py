# SPDX-License-Identifier: Apache-2.0
"""Start a function on every rank of a loopback world."""

from __future__ import annotations

import pkgutil
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.loopback.exchange import Exchange, WorldEnded
from hyperep.loopback.platform import LoopbackPlatform
from hyperep.platform.errors import RankFailure

__all__ = ["LoopbackLauncher", "launcher", "run"]


def run(function: Callable[..., Any], world_size: int, *, deadline: float = 60.0) -> list[Any]:
    """Call ``function(platform)`` once per rank, each in a thread of its own, and return the results by rank.

    Args:
        function: called with this rank's :class:`LoopbackPlatform`, which is also the platform in scope there.
        world_size: number of ranks.
        deadline: seconds that a rank waits for the others in one collective.

    Raises:
        RankFailure: a rank raised. The others are ended; the message has that rank's traceback, and the error itself
            is the ``__cause__``.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: a world has at least one rank")
    exchange = Exchange(world_size, deadline)
    results: list[Any] = [None] * world_size
    errors: list[tuple[int, BaseException]] = []

    def work(rank: int) -> None:
        from hyperep.platform.selection import use_platform

        platform = LoopbackPlatform(rank, exchange)
        try:
            with use_platform(platform):
                results[rank] = function(platform)
        except BaseException as error:
            errors.append((rank, error))
            exchange.fail(rank, error)
        finally:
            exchange.end(rank)

    threads = [
        threading.Thread(target=work, args=(r,), name=f"loopback-rank-{r}", daemon=True) for r in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = next((e for e in errors if not isinstance(e[1], WorldEnded)), errors[0])
        shown = "".join(traceback.format_exception(error))
        raise RankFailure(
            f"rank {rank} of {world_size} failed with {type(error).__name__}: {error}\n{shown}"
        ) from error
    return results


class LoopbackLauncher(Launcher):
    """Ranks are threads, so a world of any size is one process, and a program runs right here."""

    def joined(self) -> bool:  # noqa: D102
        return False

    def plan(self, ranks: int) -> LaunchPlan:  # noqa: D102
        return LaunchPlan(processes=(RankProcess(ranks=tuple(range(ranks))),))

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:  # noqa: D102
        return run(function, len(process.ranks))

    def run(  # noqa: D102
        self,
        platform_name: str,
        program: str,
        arguments: Mapping[str, Any],
        ranks: int,
        *,
        deadline: float | None = None,
    ) -> Any:
        function = pkgutil.resolve_name(program)
        return run(lambda platform: function(platform, **arguments), ranks, deadline=deadline or 60.0)[0]


launcher = LoopbackLauncher()
