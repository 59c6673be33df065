# SPDX-License-Identifier: Apache-2.0
"""Bringing the benchmark and its ranks together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hyperep.bench.shapes import Shape
from hyperep.bench.way import Way
from hyperep.launch import Launcher, run_on_ranks
from hyperep.launch.joined import watched_steps
from hyperep.launch.tasks import refuse_tasks
from hyperep.launch.timeout import step_timeout
from hyperep.platform.reference import resolve
from hyperep.platform.selection import get_platform, select, use_platform

__all__ = ["PROGRAM", "start", "start_program"]

PROGRAM = "hyperep.bench.program:run"


def start(
    shapes: Sequence[Shape],
    *,
    platform_name: str | None,
    ranks: int | None,
    repetitions: int,
    naive: bool,
    together: bool = False,
    way: Way | None = None,
) -> list[dict[str, Any]] | None:
    """Measure *shapes* on new ranks of a platform, or as one rank of the launch that this process is part of.

    With *together* the shapes take turns with each other.

    Returns:
        A record for each shape; ``None`` on the other ranks of a launch that is joined.

    Raises:
        ValueError: the experts of a shape do not divide by the ranks, or the ranks do not fit the launch.
        PlatformError: there is no such platform, a rank failed or did not start.
    """
    arguments: dict[str, Any] = {
        "repetitions": repetitions,
        "naive": naive,
        "together": together,
        "way": dataclasses.asdict(way or Way()),
    }
    return start_program(PROGRAM, shapes, arguments, platform_name=platform_name, ranks=ranks)


def start_program(
    program: str,
    shapes: Sequence[Shape],
    arguments: Mapping[str, Any],
    *,
    platform_name: str | None,
    ranks: int | None,
) -> list[dict[str, Any]] | None:
    """Run ``program(platform, shapes, **arguments)`` on every rank; the rest is as for :func:`start`."""
    timeout = step_timeout()
    spec = select(platform_name).spec
    assert spec is not None, "a viable candidate has a spec"
    launcher = resolve(spec.launcher) if spec.launcher else None
    assert launcher is None or isinstance(launcher, Launcher), spec.launcher
    run: Any = resolve(program)
    given = {"shapes": [dataclasses.asdict(shape) for shape in shapes], **arguments}
    if launcher is not None and launcher.joined():
        with use_platform(spec.name) as platform:
            if ranks not in (None, platform.world_size):
                raise ValueError(
                    f"ranks={ranks}, but this process is one of {platform.world_size} that were launched already; "
                    "leave out --ranks, or start hyperep bench outside that launch"
                )
            with watched_steps(platform.rank, timeout):
                records: list[dict[str, Any]] = run(platform, **given)
            return records if platform.rank == 0 else None
    refuse_tasks(os.environ, f"platform {spec.name!r}", "start one task, and name the ranks with --ranks")
    ranks = (2 if launcher is not None else 1) if ranks is None else ranks
    if ranks < 1 or (ranks > 1 and launcher is None):
        raise ValueError(f"ranks={ranks}: platform {spec.name!r} takes {'at least 1' if launcher else 'exactly 1'}")
    for shape in shapes:
        shape.check(ranks)
    if launcher is None:
        with use_platform(get_platform(spec.name)) as platform:
            alone: list[dict[str, Any]] = run(platform, **given)
            return alone
    found: list[dict[str, Any]] = run_on_ranks(launcher, spec.name, program, given, ranks, timeout=timeout)
    return found
