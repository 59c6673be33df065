# SPDX-License-Identifier: Apache-2.0
"""What was observed: the ranks' parts put together, without an opinion on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.subject import Part

__all__ = ["Observed", "Parts", "Whole", "put_together"]

Arrays = Mapping[str, np.ndarray]
Parts = Part | tuple[Part, ...]
"""What one rank holds of one weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """One weight (or its gradient) as the ranks hold it, put together."""

    views: np.ndarray
    """``[V, ...]``: what each rank sees, completed by others where it holds a part only; one view if all agree and
    nothing is replicated."""
    absent: np.ndarray
    """``[V, ...]``, bool: where there is no number."""
    replicated: bool
    """Whether every rank holds all of it (and there are several)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Observed:
    """What the ranks sent home from one examination."""

    ranks: int
    outcome: str
    """``"done"``, ``"not offered"``, ``"raised"``, ``"hung"`` or ``"died"``."""
    message: str = ""
    places: tuple[str, ...] = ()
    """Where each rank stood, if it did not end; or what it raised."""
    detail: str = ""
    action: str = ""
    found: tuple[Mapping[str, object], ...] = ()
    """Of each rank, what ``on_rank.py`` has found, by label."""

    def of(self, label: str) -> list[np.ndarray | None]:
        """The array of every rank under *label*."""
        return [found.get(label) for found in self.found]  # type: ignore[misc]

    def parts(self, label: str) -> list[Mapping[str, Parts]]:
        """The parts of every rank under *label*."""
        return [found[label] for found in self.found]  # type: ignore[misc]


def put_together(parts: Sequence[Mapping[str, Parts]], canonical: Callable[[Arrays], Arrays]) -> dict[str, Whole]:
    """Complete what each rank holds by what others hold, and give it the names and layout of the claims."""
    ranks = len(parts)
    names = list(dict.fromkeys(name for of_rank in parts for name in of_rank))
    views: list[dict[str, np.ndarray]] = []
    holes: list[dict[str, np.ndarray]] = []
    for viewer in range(ranks):
        values, absent = {}, {}
        for name in names:
            values[name], absent[name] = _view([of_rank.get(name) for of_rank in parts], viewer)
        views.append(dict(canonical(values)))
        holes.append({name: hole != 0 for name, hole in canonical(absent).items()})
    everywhere = {name: np.float64(_is_replicated(parts, name)) for name in names}
    shapes = {name: next(_all(of_rank[name])[0].whole for of_rank in parts if name in of_rank) for name in names}
    flags = canonical({name: np.full(shapes[name], everywhere[name]) for name in names})
    found = {}
    for name in views[0]:
        stacked, hole = np.stack([view[name] for view in views]), np.stack([h[name] for h in holes])
        replicated = bool(np.all(flags[name] != 0))
        same = not replicated and all(np.array_equal(stacked[0], other, equal_nan=True) for other in stacked[1:])
        one = slice(0, 1) if same else slice(None)
        found[name] = Whole(views=stacked[one], absent=hole[one], replicated=replicated)
    return found


def _view(parts: Sequence[Parts | None], viewer: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and holes (one where there is none) of the whole, as *viewer* sees it."""
    shape = next(_all(part)[0].whole for part in parts if part is not None)
    values, absent = np.zeros(shape), np.ones(shape)
    for rank in [*(r for r in reversed(range(len(parts))) if r != viewer), viewer]:
        for part in _all(parts[rank]):
            where = tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))
            values[where] = 0.0 if part.value is None else np.asarray(part.value, np.float64).reshape(part.shape)
            absent[where] = part.value is None
    return values, absent


def _all(parts: Parts | None) -> tuple[Part, ...]:
    return () if parts is None else parts if isinstance(parts, tuple) else (parts,)


def _is_replicated(parts: Sequence[Mapping[str, Parts]], name: str) -> bool:
    everyone = [_all(of_rank.get(name)) for of_rank in parts]
    return len(parts) > 1 and all(len(own) == 1 and own[0].shape == own[0].whole for own in everyone)
