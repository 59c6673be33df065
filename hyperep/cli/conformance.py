# SPDX-License-Identifier: Apache-2.0
"""``hyperep conformance``: check a platform, list the requirements, print the matrix."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from hyperep.cli.set_aside import set_aside
from hyperep.conformance.catalogue import requirements
from hyperep.conformance.difference import difference, told
from hyperep.conformance.matrix import as_markdown
from hyperep.conformance.page import as_html
from hyperep.conformance.report import Report, Result
from hyperep.conformance.suite import check_target
from hyperep.conformance.target import find_target
from hyperep.conformance.text import listing, summary
from hyperep.conformance.verdict import CONFORMING, Verdict
from hyperep.writable import require_writable_file

__all__ = ["conformance"]

conformance = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Check a platform on real ranks.")


@conformance.command("list")
def list_requirements(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of the documentation.")] = False,
) -> None:
    """List every requirement: id, level, and what it demands."""
    if markdown:
        print(listing(), end="")
        return
    for r in requirements().values():
        print(f"{r.id:30} {r.level.value:9} {r.demand}")
    print(f"{len(requirements())} requirements")


@conformance.command()
def run(
    platform: Annotated[str, typer.Option(help="Name of an installed platform.")],
    world_size: Annotated[str, typer.Option(help="Numbers of ranks, such as 1,2,3,4.")] = "1,2,3,4",
    report: Annotated[Path | None, typer.Option(help="Write the report there, as JSON.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Id of a requirement, or its beginning; may be repeated. Of a part there is no verdict."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all data.")] = 0,
    repeat: Annotated[int, typer.Option(help="Run everything so often on the same ranks; the worst counts.")] = 1,
    deadline: Annotated[float, typer.Option(help="Seconds that one requirement may take.")] = 60.0,
    output: Annotated[bool, typer.Option("--output", help="Print, and keep in the report, what ranks print.")] = False,
    details: Annotated[bool, typer.Option("--details", help="Print tracebacks and stacks of what failed.")] = False,
) -> None:
    """Run the suite; exit status 0 if and only if the platform conforms, or what was asked for with --only passed."""
    try:
        sizes = [int(part) for part in world_size.split(",")]
    except ValueError:
        raise ValueError(f"--world-size {world_size}: give numbers of ranks such as 1,2,3,4") from None
    if report is not None:
        require_writable_file(report, "--report")
    with set_aside() as probing:  # what a framework says while it is imported here
        target = find_target(platform)
    found = check_target(
        target,
        sizes,
        only=only or (),
        seed=seed,
        repeat=repeat,
        deadline=deadline,
        output=output,
        progress=_show,
    )
    if output and (said := probing()).strip():
        found = dataclasses.replace(found, output={"the probe": said, **found.output})
    try:
        if report is not None:
            found.save(report)
    finally:  # what was found is told, whatever comes of the file
        print(file=sys.stderr)
        print(summary(found, details=details))
    raise typer.Exit(0 if found.passed else 1)


@conformance.command()
def matrix(
    reports: Annotated[list[Path], typer.Argument(help="Reports, as written by run --report.")],
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page with filters there.")] = None,
) -> None:
    """Print a Markdown table of several reports, or write it as an HTML page."""
    if html is not None:
        require_writable_file(html, "--html")
    loaded = [Report.load(path) for path in reports]
    if html is None:
        print(as_markdown(loaded), end="")
    else:
        html.write_text(as_html(loaded), encoding="utf-8")


@conformance.command()
def diff(
    old: Annotated[Path, typer.Argument(help="A report, as written by run --report.")],
    new: Annotated[Path, typer.Argument(help="A later one.")],
) -> None:
    """Say what has changed from one report to another; exit status 1 if something is worse, or not checked any more."""
    found = difference(Report.load(old), Report.load(new))
    print(told(found))
    raise typer.Exit(1 if found.regressed else 0)


def _show(result: Result) -> None:
    """A sign for each result, so that one sees that something goes on: ``b`` for what waits for another one."""
    sign = "." if result.verdict in CONFORMING else "b" if result.verdict is Verdict.BLOCKED else "F"
    print(sign, end="", file=sys.stderr, flush=True)
