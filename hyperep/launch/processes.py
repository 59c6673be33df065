# SPDX-License-Identifier: Apache-2.0
"""A program on a world of its own: start it, run it, end it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hyperep.launch.launcher import Launcher
from hyperep.launch.world import World

__all__ = ["run_processes"]


def run_processes(
    launcher: Launcher,
    platform_name: str,
    program: str,
    arguments: Mapping[str, Any],
    ranks: int,
    *,
    deadline: float | None = None,
) -> Any:
    """Run *program* on new processes and return what rank 0 returned; see :meth:`hyperep.launch.Launcher.run`."""
    end = None if deadline is None else time.monotonic() + deadline
    with World(launcher, platform_name, ranks, deadline=deadline) as world:
        remaining = None if end is None else max(0.0, end - time.monotonic())
        return world.run(program, arguments, deadline=remaining)[0]
