# SPDX-License-Identifier: Apache-2.0
"""What has changed from one report to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperep.conformance.report import Report, Result
from hyperep.conformance.verdict import CONFORMING, WORST_FIRST

__all__ = ["Change", "Difference", "difference", "told"]

_FACTS = (
    *("platform", "distribution", "framework", "device", "suite", "commit"),
    *("machine", "python", "seed", "selection"),
)


@dataclass(frozen=True)
class Change:
    """One requirement in one world, before and after."""

    old: Result
    new: Result

    @property
    def line(self) -> str:
        """All in one line; of a result that is worse, with what was found."""
        why = f": {self.new.message}" if self.is_worse and self.new.message else ""
        return f"{self.new.id} (world size {self.new.ranks}): {self.old.verdict.value} -> {self.new.verdict.value}{why}"

    @property
    def is_worse(self) -> bool:
        """Whether the new verdict is the worse one."""
        return WORST_FIRST.index(self.new.verdict) < WORST_FIRST.index(self.old.verdict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Everything that differs between two reports."""

    facts: tuple[tuple[str, str, str], ...]
    """Name, before, after: of what made the reports."""
    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    came: tuple[Result, ...]
    """Requirements, or world sizes, that only the new report has."""
    went: tuple[Result, ...]
    """Those that only the old one has."""

    @property
    def regressed(self) -> bool:
        """Whether something is worse, or is new and not met, or is not checked any more."""
        return bool(self.worse or self.went or any(not _met(result) for result in self.came))


def difference(old: Report, new: Report) -> Difference:
    """Compare two reports, requirement by requirement and world by world."""
    before = {(r.id, r.ranks): r for r in old.results}
    after = {(r.id, r.ranks): r for r in new.results}
    changes = [Change(before[at], after[at]) for at in after if at in before]
    changes = [change for change in changes if change.old.verdict is not change.new.verdict]
    facts = [(name, str(getattr(old, name)), str(getattr(new, name))) for name in _FACTS]
    return Difference(
        facts=tuple(fact for fact in facts if fact[1] != fact[2]),
        worse=tuple(change for change in changes if change.is_worse),
        better=tuple(change for change in changes if not change.is_worse),
        came=tuple(result for at, result in after.items() if at not in before),
        went=tuple(result for at, result in before.items() if at not in after),
    )


def told(found: Difference) -> str:
    """A difference for a terminal: what is worse first."""
    parts = [
        ("Worse", [change.line for change in found.worse]),
        ("Not checked any more", _listed(found.went)),
        ("Better", [change.line for change in found.better]),
        ("New", _listed(found.came)),
        ("Made otherwise", [f"{name}: {old or '-'} -> {new or '-'}" for name, old, new in found.facts]),
    ]
    lines = [line for title, entries in parts if entries for line in (f"{title}:", *(f"  {e}" for e in entries))]
    return "\n".join(lines or ["The two reports say the same."])


def _listed(results: Sequence[Result]) -> list[str]:
    """One line for each requirement and verdict, with the world sizes."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for result in results:
        sizes.setdefault((result.id, result.verdict.value), []).append(result.ranks)
    return [f"{id} (world size {', '.join(map(str, ranks))}): {verdict}" for (id, verdict), ranks in sizes.items()]


def _met(result: Result) -> bool:
    return result.verdict in CONFORMING
