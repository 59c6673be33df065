# SPDX-License-Identifier: Apache-2.0
"""A program on ranks of its own: start them, run it, end them."""

from __future__ import annotations

import pkgutil
import signal
import time
from collections.abc import Mapping
from typing import Any

from hyperep.launch.interruption import interruptible
from hyperep.launch.launcher import Launcher
from hyperep.launch.plan import RankProcess
from hyperep.launch.steps import step_limit
from hyperep.launch.world import World

__all__ = ["run_on_ranks"]

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def run_on_ranks(
    launcher: Launcher,
    platform_name: str,
    program: str,
    arguments: Mapping[str, Any],
    ranks: int,
    *,
    deadline: float | None = None,
    timeout: float | None = None,
) -> Any:
    """Run *program* on a new world of *ranks* ranks and return what rank 0 returned.

    A *program* is a ``"module:function"`` string. Every rank calls ``function(platform, **arguments)`` with its own
    platform, which is also the platform in scope. Arguments and results are plain data (what ``json`` can hold).

    Args:
        launcher: of the platform. Ranks that are threads run in this process, all others in processes of their own.
        platform_name: name of the platform.
        program: what to run.
        arguments: passed by keyword.
        ranks: how many.
        deadline: seconds for the whole run of ranks that are processes; ``None`` waits as long as they live.
        timeout: seconds that a rank may take to start, and from one :func:`hyperep.launch.step_done` to the next;
            ``None`` for a program that does not say when a step is done.

    Raises:
        RankFailure: a rank raised, died, was stopped, never started, or was late. It names the rank; no process is
            left behind.
        Interrupted: this process was asked to end (SIGTERM, SIGHUP); the ranks have ended.
    """
    with interruptible(_ENDING):
        if launcher.threads:
            function = pkgutil.resolve_name(program)
            everyone = RankProcess(ranks=tuple(range(ranks)))
            with step_limit(timeout):
                return launcher.host(everyone, lambda platform: function(platform, **arguments), platform_name)[0]
        end = None if deadline is None else time.monotonic() + deadline
        start = min((seconds for seconds in (deadline, timeout) if seconds is not None), default=None)
        with World(launcher, platform_name, ranks, deadline=start) as world:
            remaining = None if end is None else max(0.0, end - time.monotonic())
            return world.run(program, arguments, deadline=remaining, timeout=timeout)[0]
