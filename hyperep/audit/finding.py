# SPDX-License-Identifier: Apache-2.0
"""``Finding``: one cause, and everything that was seen of it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Certainty", "Finding", "Seen", "Smallest"]

Certainty = str
"""``"certain"``: the numbers leave nothing unexplained, and nothing else would explain them; ``"likely"``: something
else might; ``"unknown"``: it is wrong, but no known cause explains it."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An examination in which something was seen."""

    examination: str
    ranks: int
    error: float
    """Relative."""


@dataclass(frozen=True, kw_only=True)
class Smallest:
    """The smallest input found that shows it."""

    examination: str
    ranks: int
    tokens: tuple[tuple[int, ...], ...]
    """Batch by batch (in the order of their names), the number of tokens of each rank."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong, and why."""

    cause: str
    """A short name; see ``causes.py``."""
    quantities: tuple[str, ...]
    where: str
    """What the wrong terms have in common."""
    summary: str
    """What is seen, in one sentence."""
    reason: str
    """What is likely wrong in the code; may be empty."""
    condition: str
    """When it happens, "only ..."; empty if always."""
    certainty: Certainty
    factor: float | None
    equals: tuple[str, ...]
    """What the factor equals: ``"R"`` ranks, ``"K"`` choices, ``"L"`` experts of a rank, ``"E"`` experts."""
    residual: float
    """What the cause leaves unexplained, relative."""
    seen: tuple[Seen, ...]
    detail: str = ""
    """What was fitted, in words; it is in the summary."""
    rivals: tuple[str, ...] = ()
    """Other causes that would explain all of it, the likeliest first."""
    places: tuple[str, ...] = ()
    """Where each rank stood, if the ranks did not end."""
    smallest: Smallest | None = None
    script: str | None = field(default=None, repr=False)
    """A program that shows it without this package; ``None`` where there is none."""
    scriptless: str = ""
    """Why there is none."""

    @property
    def headline(self) -> str:
        """The summary and its condition."""
        return f"{self.summary}, only {self.condition}" if self.condition else self.summary
