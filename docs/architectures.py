# SPDX-License-Identifier: Apache-2.0
"""What holds of which architecture of transformers: a table of what ``--write-matrix`` of their tests has left.

The tests need PyTorch; the page can be made where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["as_markdown", "recorded"]

_DOORS = ("inside transformers", "any model")
_NOTES = "¹²³⁴⁵⁶⁷⁸⁹"


def recorded() -> dict[str, Any]:
    """The last run over all architectures."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
    return found


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table, with notes below it, and of when and what it is."""
    cells = found["cells"]
    checks = list(next(iter(cells.values())))
    notes: dict[str, str] = {}
    rows = [
        f"| `{name}` | " + " | ".join(_cell(cells[name][check], notes) for check in checks) + " |"
        for name in sorted(cells)
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            f"Last run on {found['date']}, with {versions}.",
            "",
            f"| architecture | {' | '.join(checks)} |",
            "|---|" + "---|" * len(checks),
            *rows,
            "",
            *(f"{sign} {why}.  " for why, sign in notes.items()),
            "",
        ]
    )


def _cell(doors: Mapping[str, str | None], notes: dict[str, str]) -> str:
    """A sign for each door; one note alone where it is that of both."""
    signs = [_sign(doors[door], notes) for door in _DOORS if door in doors]
    return signs[0] if len(set(signs)) == 1 and signs[0] != "✓" else "".join(signs)


def _sign(why: str | None, notes: dict[str, str]) -> str:
    return "✓" if why is None else notes.setdefault(why, _NOTES[len(notes)])
