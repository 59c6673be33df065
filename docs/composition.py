# SPDX-License-Identifier: Apache-2.0
"""What composes with what: the rows that the tests of PyTorch declare by ``@pytest.mark.composes(tool, what)``.

They are read and not imported, so the page can be made where there is no PyTorch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Row", "as_markdown", "rows"]

ROOT = Path(__file__).parents[1]
FOLDERS = ("backends/torch/tests", "backends/torch/tests_transformers")


@dataclass(frozen=True)
class Row:
    """A row: with which tool, what holds (or whose limit it is), and the test that shows it."""

    tool: str
    what: str
    file: str
    test: str


def rows() -> list[Row]:
    """All rows, by tool in the order of the alphabet, and for each in the order of files and lines."""
    found = [row for folder in FOLDERS for path in sorted((ROOT / folder).glob("test_*.py")) for row in _declared(path)]
    return sorted(found, key=lambda row: row.tool.strip("`").lower())


def as_markdown(found: list[Row]) -> str:
    """The table of the page, whose links begin in ``docs``."""
    lines = ["| with | what holds | shown by |", "|---|---|---|"]
    before = ""
    for row in found:
        lines.append(f"| {row.tool if row.tool != before else ''} | {row.what} | [{row.test}](../{row.file}) |")
        before = row.tool
    return "\n".join(lines) + "\n"


def _declared(path: Path) -> Iterator[Row]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            for mark in reversed(node.decorator_list):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.composes":
                    tool, what = (ast.literal_eval(argument) for argument in mark.args)
                    yield Row(tool, what, path.relative_to(ROOT).as_posix(), node.name)
