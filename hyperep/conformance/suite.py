# SPDX-License-Identifier: Apache-2.0
"""The whole suite on one platform."""

from __future__ import annotations

import datetime
import os
import platform as host
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import hyperep
from hyperep.conformance.catalogue import find, requirements
from hyperep.conformance.origin import suite_commit
from hyperep.conformance.report import WORLD_SIZES, Report, Result, merged
from hyperep.conformance.requirement import Requirement
from hyperep.conformance.target import Target, find_target
from hyperep.conformance.verdict import Verdict
from hyperep.conformance.world_run import STARTS, WorldRun
from hyperep.platform.errors import RankFailure

__all__ = ["check_platform", "check_target", "described", "failures_first", "make_report", "selected"]


def check_platform(
    name: str,
    world_sizes: Sequence[int] = WORLD_SIZES,
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    repeat: int = 1,
    deadline: float = 60.0,
    output: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Run the suite on an installed platform and return its report.

    Args:
        name: name of the platform.
        world_sizes: numbers of ranks to run it with, one after the other.
        only: ids of requirements, or beginnings of them; what they need is run too. Everything, if empty. The report
            of a part is no verdict on the platform: its ``conforms`` is ``None``, and ``passed`` tells of the part.
        seed: of all data.
        repeat: how often everything is run in each world, on the same ranks and data. The worst counts.
        deadline: seconds that one requirement may take in one world.
        output: keep what ranks print in the report.
        progress: called with each result as it comes.

    Raises:
        PlatformError: the platform is not installed, or cannot be used here.
        ValueError: a world size or *repeat* is below one, or *only* names nothing.
    """
    return check_target(
        find_target(name),
        world_sizes,
        only=only,
        seed=seed,
        repeat=repeat,
        deadline=deadline,
        output=output,
        progress=progress,
    )


def check_target(
    target: Target,
    world_sizes: Sequence[int],
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    repeat: int = 1,
    deadline: float = 60.0,
    output: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """As :func:`check_platform`, for a platform that is described by hand."""
    if not world_sizes or min(world_sizes) < 1:
        raise ValueError(f"world_sizes={list(world_sizes)}: give one or more numbers of ranks, each at least 1")
    if repeat < 1:
        raise ValueError(f"repeat={repeat}: everything is run at least once")
    chosen = selected(only)
    began = time.monotonic()
    results: list[Result] = []
    remarks: list[str] = []
    printed: dict[str, str] = {}
    description: Mapping[str, object] = {}
    for ranks in world_sizes:
        with WorldRun(target, ranks, seed=seed, deadline=deadline) as world:
            # All of them again, and not each one: whether one passes may depend on what ran before it.
            for requirement in chosen * repeat:
                results.append(world.run(requirement))
                if progress is not None:
                    progress(results[-1])
            description = described(world) or description
        remarks += world.remarks
        printed |= world.printed
    return make_report(
        target,
        description,
        world_sizes,
        seed,
        time.monotonic() - began,
        merged(results),
        selection=tuple(only) or None,
        repeat=repeat,
        remarks=remarks,
        output=printed if output else {},
    )


def described(world: WorldRun) -> Mapping[str, object]:
    """What the platform says of itself; nothing where its ranks did not start."""
    try:
        return world.description
    except RankFailure:
        return {}


def make_report(
    target: Target,
    description: Mapping[str, object],
    world_sizes: Sequence[int],
    seed: int,
    seconds: float,
    results: Sequence[Result],
    *,
    selection: Sequence[str] | None = None,
    repeat: int = 1,
    remarks: Sequence[str] = (),
    output: Mapping[str, str] | None = None,
) -> Report:
    """Put a report together; *selection* is what the run was confined to."""
    capabilities = description.get("capabilities", target.declared)
    announced = description.get("announced", ())
    assert isinstance(capabilities, Mapping)
    assert isinstance(announced, Sequence)
    return Report(
        platform=target.name,
        distribution=target.distribution,
        framework=target.framework,
        device=str(description.get("device", "")),
        capabilities=dict(capabilities),
        announced=(*target.announced, *announced),
        remarks=tuple(remarks),
        suite=f"hyperep {hyperep.__version__}",
        commit=suite_commit(),
        python=f"{host.python_implementation()} {host.python_version()}, NumPy {np.__version__}",
        machine=f"{host.system()} {host.machine()}, {os.cpu_count()} CPUs",
        requirements=len(requirements()),
        selection=None if selection is None else tuple(selection),
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        world_sizes=tuple(world_sizes),
        seed=seed,
        seconds=round(seconds, 1),
        repeat=repeat,
        output=dict(output or {}),
        results=tuple(results),
    )


def selected(only: Sequence[str]) -> list[Requirement]:
    """The requirements whose id is in *only* or begins with an entry of it, and all that they need, in order.

    Raises:
        ValueError: an entry fits no requirement.
    """
    known = requirements()
    wanted: set[str] = {STARTS}

    def want(id: str) -> None:
        if id not in wanted:
            wanted.add(id)
            for need in find(id).needs:
                want(need)

    for entry in only:
        fitting = [entry] if entry in known else [id for id in known if id.startswith(entry)]
        if not fitting:
            find(entry)
        for id in fitting:
            want(id)
    return [r for r in known.values() if not only or r.id in wanted]


def failures_first(results: Sequence[Result]) -> list[Result]:
    """The results that an author has to look at, those that block most others first; blocked ones are left out."""
    bad = [r for r in results if r.verdict in (Verdict.FAILED, Verdict.MISSING, Verdict.UNEXPECTED)]
    blocked = [r.message for r in results if r.verdict is Verdict.BLOCKED]
    return sorted(bad, key=lambda r: -blocked.count(f"blocked by {r.id}"))
