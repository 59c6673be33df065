# SPDX-License-Identifier: Apache-2.0
"""The entry point: builds the application around one command, and turns errors of the user into one message."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from hyperep.cli.commands import COMMANDS, Command
from hyperep.launch.interruption import Interrupted, interruptible
from hyperep.platform.errors import PlatformError, RankFailure
from hyperep.platform.reference import resolve

__all__ = ["TRACEBACK_VARIABLE", "main"]

TRACEBACK_VARIABLE = "HYPEREP_TRACEBACK"
"""Environment variable: set to 1 to see the whole traceback of an error, like the option ``--traceback``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``hyperep`` with *arguments* (by default the process's own) and exit.

    Exit status: 0 if all is well; 1 if the command says that something it checked is not; 2 for wrong usage, and for
    errors about what the user gave or what is installed (``ValueError``, ``OSError``, ``PlatformError``), which print
    as one message. ``--traceback``, anywhere in the line, shows them whole. A signal that asks to end gives one line,
    and 128 more than its number: 130 for Ctrl-C, 143 for SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    whole = "--traceback" in given or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")
    given = [argument for argument in given if argument != "--traceback"]
    try:
        with interruptible((signal.SIGINT,)):
            _run(given)
    except Interrupted as end:
        _leave(f"hyperep: {end}", end.status)
    except (ValueError, OSError, PlatformError) as error:
        if whole and not isinstance(error, RankFailure):
            raise
        message = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
        if isinstance(error, RankFailure):
            # Where ranks stood is theirs, not this process's; and all of it is too much for a screen.
            message = error.details if whole else _with_way_to_more(message)
        _leave(f"hyperep: error: {message}", 2)


def _with_way_to_more(message: str) -> str:
    """A report of ranks, which ends with the cause, with a line before that one."""
    *lines, cause = message.split("\n")
    return "\n".join([*lines, f"--- more of every rank: --traceback, or {TRACEBACK_VARIABLE}=1", cause])


def _leave(message: str, status: int) -> NoReturn:
    """End with *message*, on a line of its own and with the cursor that a progress bar may have hidden."""
    if sys.stderr.isatty():
        print("\r\x1b[K\x1b[?25h", end="", file=sys.stderr)
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


def _run(arguments: list[str]) -> None:
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback(help="Expert parallelism that is written once and runs on every platform.")
    def options(
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
        # Taken out of the line before it is parsed; declared so that --help shows it.
        traceback: Annotated[bool, typer.Option("--traceback", help="Show errors with their whole traceback.")] = False,
    ) -> None:
        pass

    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command in COMMANDS:
        function = resolve(command.function) if command.name == wanted else _placeholder(command)
        assert callable(function), command.function
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=command.name, short_help=command.help)
        else:
            app.command(command.name, short_help=command.help)(function)
    if wanted is None and "--version" in arguments:
        print(f"hyperep {_version()}")
        return
    app(arguments, prog_name="hyperep")


def _placeholder(command: Command) -> Callable[[], None]:
    """Stand in for a command that is only listed, so that its module need not be imported."""

    def placeholder() -> None:
        raise AssertionError(f"{command.name} was listed, not chosen")

    return placeholder


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("hyperep")
    except metadata.PackageNotFoundError:
        return "(not installed)"
