# SPDX-License-Identifier: Apache-2.0
"""``hyperep doctor``: what is missing or wrong here, and the line that puts it right."""

from __future__ import annotations

import os
import platform as host
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperep.cli.platforms import look
from hyperep.launch.timeout import TIMEOUT_VARIABLE
from hyperep.platform.candidate import Candidate, State
from hyperep.platform.errors import PlatformError
from hyperep.platform.registry import BLOCK_VARIABLE, blocked_names
from hyperep.platform.removals import class_made_by, used_by_class, used_by_spec
from hyperep.platform.selection import PLATFORM_VARIABLE, select

__all__ = ["announced", "doctor"]

PUBLISHED = {"torch": "hyperep-torch", "torch_npu": "hyperep-torch-npu", "mindspore": "hyperep-mindspore"}
"""Platforms that this project publishes, and the distribution of each: what a newcomer may be missing."""

_LAUNCH_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MS_ROLE", "MS_WORKER_NUM"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "PMI_RANK", "PMI_SIZE"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", TIMEOUT_VARIABLE),
)


def doctor() -> None:
    """Say what is missing or wrong, and the line that puts it right.

    Exit status 1 if something needs a hand: a requirement of hyperep is missing, a platform is broken or claimed twice,
    or no platform would be chosen here. A platform that is merely not viable, or not installed, is a remark: many
    machines have one framework and not the others. The same holds for a machine with the loopback platform alone,
    where everything works, as a reference, without a framework.
    """
    console = Console(soft_wrap=True)
    console.print(_versions())
    candidates = look()
    for candidate in candidates:
        console.print(f"[bold]{escape(candidate.name)}[/bold]: {candidate.state.value}. {escape(candidate.reason)}")
    chosen, problems, remarks = _selection(candidates)
    problems = [*_missing_requirements(), *_broken(candidates), *problems]
    remarks = [*remarks, *announced(candidates), *_installable(candidates), *_variables(candidates)]
    if chosen:
        console.print(f"\nget_platform() chooses [bold]{escape(chosen)}[/bold] here.")
    for remark in remarks:
        console.print(f"[yellow]remark:[/yellow] {escape(remark)}")
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    if problems:
        raise typer.Exit(1)
    console.print("[green]No problem found.[/green]")


def _versions() -> Table:
    result = Table("What", "Version", title="This machine", title_justify="left")
    result.add_row("Python", f"{host.python_version()} ({sys.executable})")
    result.add_row("System", host.platform())
    for name in ("hyperep", *PUBLISHED.values(), *_requirements()):
        result.add_row(name, _version(name) or "-")
    return result


def _requirements() -> list[str]:
    """Names of the distributions that hyperep itself needs; none if it is not installed but merely on the path."""
    try:
        lines = metadata.requires("hyperep") or []
    except metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _missing_requirements() -> list[str]:
    missing = [name for name in _requirements() if _version(name) is None]
    return [f"requirements of hyperep are missing; install them: pip install {' '.join(missing)}"] if missing else []


def _broken(candidates: Sequence[Candidate]) -> list[str]:
    return [
        f"{candidate.describe()}; repair or uninstall {' or '.join(filter(None, candidate.distributions))}"
        for candidate in candidates
        if candidate.state is State.BROKEN
    ]


def _selection(candidates: Sequence[Candidate]) -> tuple[str, list[str], list[str]]:
    """What is chosen when nobody names a platform, with the problems and remarks that choosing made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            chosen = select().name
        except PlatformError as error:
            return "", [str(error)], []
    return chosen, [], [str(warning.message) for warning in caught]


def announced(candidates: Sequence[Candidate]) -> list[str]:
    """What platforms that work here use, and that goes in a later version of the protocol, a sentence each."""
    found = []
    for candidate in candidates:
        if candidate.state is State.VIABLE and candidate.spec is not None:
            kind = class_made_by(candidate.spec)
            used = [*used_by_spec(candidate.spec), *(used_by_class(kind) if kind else ())]
            found += [removal.announce(candidate.name) for removal in used]
    return found


def _installable(candidates: Sequence[Candidate]) -> list[str]:
    remarks = [
        f"{candidate.name} is not viable; to install what is missing: {candidate.install_hint}"
        for candidate in candidates
        if candidate.state is State.NOT_VIABLE and candidate.install_hint
    ]
    names = {candidate.name for candidate in candidates}
    remarks += [
        f"{name} is not installed; if you want it: pip install {distribution}"
        for name, distribution in PUBLISHED.items()
        if name not in names
    ]
    if not any(candidate.state is State.VIABLE and candidate.priority >= 0 for candidate in candidates):
        remarks.append("no framework can be used here; what works is for reference and tests")
    return remarks


def _variables(candidates: Sequence[Candidate]) -> list[str]:
    names = {candidate.name for candidate in candidates}
    remarks = [
        f"{BLOCK_VARIABLE} rules out {name!r}, which is not installed" for name in sorted(blocked_names() - names)
    ]
    given = {
        name: os.environ[name] for name in (PLATFORM_VARIABLE, BLOCK_VARIABLE, *_LAUNCH_VARIABLES) if name in os.environ
    }
    if given:
        remarks.append("set in the environment: " + ", ".join(f"{name}={value}" for name, value in given.items()))
    return remarks
