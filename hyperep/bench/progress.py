# SPDX-License-Identifier: Apache-2.0
"""What people see while things are timed: how far it is, drawn between two measurements and never during one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

__all__ = ["show_progress"]


@contextmanager
def show_progress(visible: bool, *, console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what is called with a name, the repetitions of it that are done, and how many there are.

    On a terminal a bar for each name, elsewhere a line when one begins; both on standard error.
    """
    console = console or Console(stderr=True)
    if not visible or not console.is_terminal:

        def say(name: str, done: int, total: int) -> None:
            if visible and done == 0:
                console.print(f"timing {name}: {total} repetitions, one of them to warm up", highlight=False)

        yield say
        return
    columns = (TextColumn("[bold]timing[/] {task.description}"), BarColumn(), MofNCompleteColumn())
    # Without a thread that redraws the bars: it would run beside what is timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bars: dict[str, TaskID] = {}

        def draw(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)
            progress.refresh()

        yield draw
