# SPDX-License-Identifier: Apache-2.0
"""Bringing the program and its ranks together."""

from __future__ import annotations

import os
from typing import Any

from hyperep.launch import Launcher, run_on_ranks
from hyperep.launch.joined import watched_steps
from hyperep.launch.tasks import refuse_tasks
from hyperep.launch.timeout import step_timeout
from hyperep.platform.reference import resolve
from hyperep.platform.selection import get_platform, select, use_platform
from hyperep.train.loop import main
from hyperep.train.preflight import preflight
from hyperep.train.settings import Settings

__all__ = ["PROGRAM", "start"]

PROGRAM = "hyperep.train.loop:main"


def start(settings: Settings, *, platform_name: str | None = None, ranks: int | None = None) -> dict[str, Any]:
    """Train on new ranks of a platform, or as one rank of the launch that this process already is part of.

    Args:
        settings: of the run.
        platform_name: as for :func:`hyperep.get_platform`.
        ranks: how many to start, by default one; in a launch that is joined it must be that launch's number.

    Returns:
        The final figures, as rank 0 has them; in a launch that was joined, what people are told is rank 0's alone.

    Raises:
        ValueError, OSError: what the user gave cannot be used; see :func:`hyperep.train.preflight.preflight`.
        PlatformError: there is no such platform, a rank failed or did not start.
    """
    timeout = step_timeout()
    spec = select(platform_name).spec
    assert spec is not None, "a viable candidate has a spec"
    launcher = resolve(spec.launcher) if spec.launcher else None
    assert launcher is None or isinstance(launcher, Launcher), spec.launcher
    if launcher is not None and launcher.joined():
        with use_platform(spec.name) as platform:
            if ranks not in (None, platform.world_size):
                raise ValueError(
                    f"ranks={ranks}, but this process is one of {platform.world_size} that were launched already; "
                    f"leave out --ranks, or start hyperep train outside that launch"
                )
            with watched_steps(platform.rank, timeout):
                summary = main(platform, settings.as_dict())
            return summary if platform.rank == 0 else {**summary, "lines": []}

    refuse_tasks(os.environ, f"platform {spec.name!r}", "start one task, and name the ranks with --ranks")
    # Before anything is started, so that what the user got wrong is one message and not that of a failed rank.
    ranks = 1 if ranks is None else ranks
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: a world has at least one rank")
    preflight(settings, spec, ranks)
    if launcher is not None:
        arguments = {"settings": settings.as_dict()}
        result: dict[str, Any] = run_on_ranks(launcher, spec.name, PROGRAM, arguments, ranks, timeout=timeout)
        return result
    if ranks > 1:
        raise ValueError(f"ranks={ranks}, but platform {spec.name!r} names no launcher and is always one rank")
    with use_platform(get_platform(spec.name)) as platform:
        return main(platform, settings.as_dict())
