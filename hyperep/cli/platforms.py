# SPDX-License-Identifier: Apache-2.0
"""``hyperep platforms``: what is installed, and whether it works here."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperep.platform.candidate import Candidate, State
from hyperep.platform.capabilities import Support, complete
from hyperep.platform.registry import default_registry
from hyperep.platform.versions import told

__all__ = ["as_record", "look", "platforms", "table"]

_COLOURS = {State.VIABLE: "green", State.NOT_VIABLE: "yellow", State.BROKEN: "red", State.BLOCKED: "blue"}


def platforms(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """List the installed platforms: name, state with its reason, distribution, protocol version, capabilities."""
    candidates = look()
    if as_json:
        print(json.dumps([as_record(candidate) for candidate in candidates], indent=2))
    elif candidates:
        Console().print(table(candidates))
    else:
        print("No platform is installed. hyperep doctor says how to install one.")


def look() -> tuple[Candidate, ...]:
    """Look at every platform. What a framework prints while it is imported goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        return default_registry().candidates()


def as_record(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate as plain data; ``reason`` is whole, with the traceback of a broken plugin."""
    spec = candidate.spec
    capabilities = complete(spec.capabilities) if spec else {}
    return {
        "name": candidate.name,
        "state": candidate.state.value,
        "reason": candidate.reason,
        "distribution": ", ".join(candidate.distributions),
        "version": ", ".join(candidate.versions),
        "api": list(spec.versions) if spec else None,
        "capabilities": {capability.value: support.value for capability, support in capabilities.items()},
    }


def table(candidates: Sequence[Candidate]) -> Table:
    """Lay candidates out as a table that fits a screen of 80 columns; nothing is cut off, long lines wrap."""
    result = Table(show_lines=True)
    result.add_column("Platform", no_wrap=True)
    result.add_column("State", no_wrap=True)
    result.add_column("What was found", overflow="fold")
    for candidate in candidates:
        colour = _COLOURS[candidate.state]
        owners = zip(candidate.distributions, candidate.versions, strict=True)
        made = [f"{name} {version}".strip() for name, version in owners]
        if candidate.spec is not None:
            made.append(f"protocol {told(candidate.spec.versions)}")
        lines = (candidate.summary, ", ".join(filter(None, made)), _capabilities(candidate))
        result.add_row(
            escape(candidate.name),
            f"[{colour}]{candidate.state.value}[/{colour}]",
            escape("\n".join(filter(None, lines))),
        )
    return result


def _capabilities(candidate: Candidate) -> str:
    """Say in a few words what a platform declares: how much is native, and by name what is not."""
    if candidate.spec is None:
        return ""
    names: dict[Support, list[str]] = {support: [] for support in Support}
    for capability, support in complete(candidate.spec.capabilities).items():
        names[support].append(capability.value)
    lines = [f"{len(names[Support.FULL])} capabilities in full"]
    lines += [f"{s.value}: {', '.join(names[s])}" for s in (Support.EMULATED, Support.UNSUPPORTED) if names[s]]
    return "\n".join(lines)
