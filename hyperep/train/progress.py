# SPDX-License-Identifier: Apache-2.0
"""What people see while a run goes on: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hyperep.train.metrics import imbalance

__all__ = ["show_progress"]

_LINES = 10
"""Lines that a run prints where there is no terminal."""


@contextmanager
def show_progress(
    steps: int, done: int = 0, *, console: Console | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show the progress of steps *done* + 1 to *steps*; yield what is called with the record of each."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        every = max(1, (steps - done) // _LINES)
        yield (
            lambda record: (
                console.print(f"step {record['step']}/{steps}  {_figures(record)}", highlight=False)
                if record["step"] % every == 0 or record["step"] in (done + 1, steps)
                else None
            )
        )
        return
    columns = (
        TextColumn("[bold]training"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, completed=done, figures="")
        yield lambda record: progress.update(task, completed=record["step"], figures=_figures(record))


def _figures(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  load max/mean {imbalance(record):.2f}"
