# SPDX-License-Identifier: Apache-2.0
"""What the terms with wrong coefficients have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.evidence import Label
from hyperep.audit.fit import Entry

__all__ = ["Pattern", "patterns", "questions"]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A property that the wrong terms have and the right ones have not."""

    name: str
    """``"all"``, or that of an attribute, such as ``"remote"`` or ``"rank"``."""
    values: tuple[object, ...]
    """The attribute's values of the wrong terms."""
    kind: str
    """``"lost"``, ``"scaled"``, ``"extra"`` for terms that do not belong there, or ``"stale"`` for those that are there
    instead of the right ones."""
    factor: float | None
    """The coefficient that they all have; ``None`` if each has another."""
    cost: float
    """How far-fetched it is."""


_ATTRIBUTES: tuple[tuple[str, float, Callable[[Label], object]], ...] = (
    ("exchanged", 2.0, lambda x: None if x.rank is None or x.owner is None else x.rank != x.owner),
    ("others", 2.0, lambda x: None if x.rank is None or x.viewer is None else x.rank != x.viewer),
    ("elsewhere", 2.2, lambda x: None if x.owner is None or x.viewer is None else x.owner != x.viewer),
    ("way", 2.0, lambda x: x.way),
    ("step", 2.4, lambda x: x.step),
    ("slot", 2.6, lambda x: x.slot),
    ("weight", 2.6, lambda x: x.weight),
    ("rank", 3.0, lambda x: x.rank),
    ("owner", 3.0, lambda x: x.owner),
    ("viewer", 3.1, lambda x: x.viewer),
    ("expert", 3.4, lambda x: x.expert),
)


_PAIRS = (("way", "exchanged"), ("rank", "owner"), ("step", "rank"))
"""Attributes that are looked at together, too."""
_SETS = ("rank", "owner", "expert")
"""Attributes of which any number of values may be wrong together."""
_ALONE = 1.0
"""What it costs a property that nothing contradicts, because all terms have it."""


def patterns(entries: Sequence[Entry], tolerance: float) -> list[Pattern]:
    """Every pattern that separates wrong from right, the simplest first; none if nothing does, or nothing is wrong."""
    wrong = {due: [e for e in entries if e.due is due and not e.is_right(tolerance)] for due in (True, False)}
    if wrong[True] and wrong[False]:
        return _stale(entries, tolerance)
    due = bool(wrong[True])
    bad, good = wrong[due], [e for e in entries if e.due is due and e.is_right(tolerance)]
    if not bad:
        return []
    kind, factor = _kind(bad, due, tolerance)
    surcharge = 0.0 if factor is not None else 3.0
    found = []
    if not good and factor is not None:
        found.append(Pattern(name="all", values=(), kind=kind, factor=factor, cost=1.0))
    attributes = list(_ATTRIBUTES)
    by_name = {name: (cost, attribute) for name, cost, attribute in _ATTRIBUTES}
    for a, b in _PAIRS:
        attributes.append((f"{a}+{b}", 3.3, functools.partial(_both, by_name[a][1], by_name[b][1])))
    for name, cost, attribute in attributes:
        of_bad, of_good = [attribute(e.label) for e in bad], {attribute(e.label) for e in good}
        if None in of_bad or None in of_good or set(of_bad) & of_good or ("+" in name and len(set(of_bad)) > 1):
            continue
        values = tuple(sorted(set(of_bad), key=str))
        if not good and (factor is None or False in values or (len(values) > 1 and name not in _SETS)):
            continue
        alone = 0.0 if good else _ALONE * len(values)
        found.append(Pattern(name=name, values=values, kind=kind, factor=factor, cost=cost + surcharge + alone))
    threshold = _threshold(bad, good)
    if threshold is not None:
        found.append(Pattern(name="place", values=(threshold,), kind=kind, factor=factor, cost=3.2 + surcharge))
    return sorted(found, key=lambda pattern: pattern.cost)


def questions(labels: Iterable[Label]) -> Iterator[tuple[str, object, float, Callable[[Label], bool]]]:
    """Each property that some of the labels have and others have not: attribute, value, cost, and the test for it."""
    by_name = {name: (cost, attribute) for name, cost, attribute in _ATTRIBUTES}
    attributes = dict(by_name)
    for a, b in _PAIRS[:1]:
        attributes[f"{a}+{b}"] = 3.3, functools.partial(_both, by_name[a][1], by_name[b][1])
    given = list(labels)
    for name, (cost, attribute) in attributes.items():
        values = {attribute(label) for label in given} - {None}
        for value in sorted(values - {False}, key=str):
            if len(values) > 1 and ("+" not in name or value[1]):  # type: ignore[index]
                yield name, value, cost, functools.partial(_has, attribute, value)


def _has(attribute: Callable[[Label], object], value: object, label: Label) -> bool:
    return attribute(label) == value


def _both(a: Callable[[Label], object], b: Callable[[Label], object], label: Label) -> object:
    pair = a(label), b(label)
    return None if None in pair else pair


def _stale(entries: Sequence[Entry], tolerance: float) -> list[Pattern]:
    """Whether what is there is what was due earlier, once, and nothing of what is due now."""
    there = [entry for entry in entries if not entry.is_right(tolerance) and not entry.due]
    lost = all(abs(entry.ratio) <= tolerance for entry in entries if entry.due)
    steps = tuple(sorted({str(entry.label.step) for entry in there}))
    once = all(abs(entry.ratio - there[0].ratio) <= 2 * tolerance for entry in there)
    if not lost or not once or len(steps) != 1:
        return []
    return [Pattern(name="step", values=steps, kind="stale", factor=there[0].ratio, cost=1.5)]


def _kind(wrong: Sequence[Entry], due: bool, tolerance: float) -> tuple[str, float | None]:
    ratios = np.array([entry.ratio for entry in wrong])
    middle = float(np.median(ratios))
    spread = float(np.abs(ratios - middle).max())
    factor = middle if spread <= 2 * tolerance * max(1.0, abs(middle)) else None
    if not due:
        return "extra", factor
    return ("lost", 0.0) if factor is not None and abs(factor) <= tolerance else ("scaled", factor)


def _threshold(wrong: Sequence[Entry], right: Sequence[Entry]) -> int | None:
    """From which place in an expert's queue on terms are wrong, if that separates them."""
    bad = [entry.label.place for entry in wrong]
    good = [entry.label.place for entry in right]
    if None in bad or None in good or not good:
        return None
    first = min(place for place in bad if place is not None)
    return first if first > max(place for place in good if place is not None) and first > 0 else None
