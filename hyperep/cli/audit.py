# SPDX-License-Identifier: Apache-2.0
"""``hyperep audit``: which gradient is wrong in a layer's expert parallelism, and why."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["audit"]

audit = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Examine somebody's layer of experts.")


@audit.command("list")
def list_examinations() -> None:
    """List the examinations."""
    from hyperep.audit.examinations import EXAMINATIONS

    for examination in EXAMINATIONS:
        print(f"{examination.name:15} {examination.what}")


@audit.command()
def run(
    subject: Annotated[str, typer.Option(help="The layer, as module:name; see docs/audit.md.")],
    world_size: Annotated[str, typer.Option(help="Numbers of ranks, such as 1,2,4.")] = "1,2,4",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report there, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page there.")] = None,
    scripts: Annotated[
        Path | None, typer.Option(help="Folder for a script of each finding, which needs nothing of hyperep.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of an examination; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all numbers.")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds that one examination may take.")] = 30.0,
    details: Annotated[bool, typer.Option("--details", help="Print every examination, and tracebacks.")] = False,
) -> None:
    """Examine a layer on real ranks; exit status 0 if and only if nothing wrong was found."""
    from rich.console import Console

    from hyperep.audit.on_rank import subject_of
    from hyperep.audit.page import as_html
    from hyperep.audit.run import check_layer
    from hyperep.audit.text import as_text
    from hyperep.writable import require_writable_file

    try:
        sizes = [int(part) for part in world_size.split(",")]
    except ValueError:
        raise ValueError(f"--world-size {world_size}: give numbers of ranks such as 1,2,4") from None
    for path, option in ((as_json, "--json"), (html, "--html")):
        if path is not None:
            require_writable_file(path, option)
    if scripts is not None and not scripts.is_dir():
        raise ValueError(f"--scripts {scripts}: there is no such folder; make it, or name another")
    # The subject most often lies beside, where an installed command would not look.
    sys.path.insert(0, os.getcwd())
    try:
        subject_of(subject)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--subject {subject}: {type(error).__name__}: {error}") from error
    found = check_layer(subject, sizes, only=only or (), seed=seed, deadline=deadline, progress=_show)
    print(file=sys.stderr)
    if as_json is not None:
        found.save(as_json)
    if html is not None:
        html.write_text(as_html(found), encoding="utf-8")
    console = Console(highlight=False)
    if details:
        for line in found.examinations:
            if line.detail:
                console.print(f"--- {line.examination} at {line.ranks} ranks\n{line.detail}", markup=False)
    console.print(as_text(found, details=details))
    for number, finding in enumerate(found.findings if scripts is not None else (), 1):
        assert scripts is not None
        path = scripts / f"finding_{number}.py"
        if finding.script is None:
            path.unlink(missing_ok=True)  # of a finding of an earlier run
            console.print(f"no script of finding {number}: {finding.scriptless}", markup=False)
        else:
            path.write_text(finding.script, encoding="utf-8")
            console.print(f"script of finding {number}: {path}", markup=False)
    raise typer.Exit(0 if found.clean else 1)


def _show(examination: str, ranks: int, outcome: str) -> None:
    """A sign for each examination, so that one sees that something goes on."""
    print({"ok": ".", "wrong": "F"}.get(outcome, "-"), end="", file=sys.stderr, flush=True)
