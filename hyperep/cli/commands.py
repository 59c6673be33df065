# SPDX-License-Identifier: Apache-2.0
"""The table of commands: to add one, write its file and add its line here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMMANDS", "Command"]


@dataclass(frozen=True)
class Command:
    """A sub-command of ``hyperep``."""

    name: str
    function: str
    """``"module:function"`` with typer annotations, or a ``typer.Typer`` with commands of its own; imported when the
    command runs or prints its own help."""
    help: str
    """One line for ``hyperep --help``."""


COMMANDS = (
    Command("platforms", "hyperep.cli.platforms:platforms", "List the installed platforms and whether they work here."),
    Command("train", "hyperep.cli.train:train", "Train a small mixture-of-experts language model on real text."),
    Command(
        "conformance", "hyperep.cli.conformance:conformance", "Check a platform on real ranks, and print the matrix."
    ),
    Command("audit", "hyperep.cli.audit:audit", "Say which gradient is wrong in your expert parallelism, and why."),
    Command("doctor", "hyperep.cli.doctor:doctor", "Say what is missing or wrong, and the line that puts it right."),
    Command("bench", "hyperep.cli.bench:bench", "Time a layer beside its limits and beside the naive way."),
)
