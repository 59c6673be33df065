# SPDX-License-Identifier: Apache-2.0
"""Coefficients of the terms: least squares, and whether what is found explains what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.evidence import Block, Label

__all__ = ["Entry", "Fit", "deviating", "error_of", "fit", "fit_one", "rows_agree", "scale_of"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A group of terms that share a coefficient."""

    label: Label
    due: bool
    """Whether it belongs into the sum; then :attr:`ratio` is 1 if all is right, else 0."""
    ratio: float
    size: float
    """Norm of the group relative to its block."""

    def is_right(self, tolerance: float) -> bool:
        """Whether the coefficient is what it should be."""
        return abs(self.ratio - float(self.due)) <= tolerance


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The coefficients of all blocks, in groups that were chosen."""

    entries: tuple[Entry, ...]
    residual: float
    """What they leave unexplained, relative to what was expected or observed, whichever is larger."""


def scale_of(blocks: Sequence[Block]) -> float:
    """The size of one block that is neither small nor large among these."""
    norms = [np.linalg.norm(block.expected) for block in blocks]
    return float(np.sqrt(np.mean(np.square(norms)))) if norms else 0.0


def error_of(block: Block, scale: float) -> float:
    """Relative deviation; of a small block relative to a part of the usual size, for what is left of cancellation."""
    deviation = block.observed - block.expected
    size = max(float(np.linalg.norm(block.expected)), 0.2 * scale, 1e-12)
    return float(np.linalg.norm(deviation)) / size if np.isfinite(deviation).all() else np.inf


def rows_agree(expected: Sequence[np.ndarray], observed: Sequence[np.ndarray], tolerance: float) -> bool:
    """Whether no row ``[D]`` of any rank deviates, by :func:`error_of`; blocks take longer to make."""
    right, found = np.concatenate(list(expected)), np.concatenate(list(observed))
    norms = np.linalg.norm(right, axis=1)
    least = 0.2 * float(np.sqrt(np.mean(norms**2))) if len(norms) else 0.0
    return bool((np.linalg.norm(found - right, axis=1) <= tolerance * np.maximum(norms, max(least, 1e-12))).all())


def deviating(blocks: Sequence[Block], tolerance: float) -> tuple[list[Block], float]:
    """The blocks that are not as expected, and the worst error."""
    scale = scale_of(blocks)
    errors = [error_of(block, scale) for block in blocks]
    return [block for block, error in zip(blocks, errors, strict=True) if error > tolerance], max(errors, default=0.0)


def fit(blocks: Sequence[Block], kept: Sequence[str], negligible: float) -> Fit:
    """Fit one coefficient to each group of terms with the same values of the attributes *kept*, block by block.

    A term that is smaller than *negligible*, relative to the largest of its block, says nothing of its coefficient.
    """
    entries, lost, size = [], 0.0, 0.0
    for block in blocks:
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, label in enumerate(block.labels):
            key = (block.right[i] != 0, *(getattr(label, name) for name in kept))
            groups.setdefault(key, []).append(i)
        vectors, labels, due = [], [], []
        for key, members in groups.items():
            weights = block.right[members] if key[0] else np.ones(len(members))
            vectors.append(weights @ block.vectors[members])
            labels.append(_common([block.labels[i] for i in members]))
            due.append(bool(key[0]))
        matrix = np.array(vectors).reshape(len(vectors), -1)
        norms = np.linalg.norm(matrix, axis=1)
        reach = max(float(norms.max(initial=0.0)), 1e-12)
        heavy = norms > negligible * reach
        aim = np.array(due, np.float64)
        # The smallest change of the right coefficients: what cannot be told apart is taken to be right.
        wanted = block.observed - aim @ matrix
        change = np.zeros(len(aim))
        if heavy.any():
            scaled = matrix[heavy] / norms[heavy, None]
            change[heavy] = np.linalg.lstsq(scaled.T, wanted, rcond=1e-4)[0] / norms[heavy]
        lost += float(((wanted - change @ matrix) ** 2).sum())
        size += max(float((block.observed**2).sum()), float((block.expected**2).sum()))
        entries += [
            Entry(label=labels[i], due=due[i], ratio=float(aim[i] + change[i]), size=float(norms[i] / reach))
            for i in np.flatnonzero(heavy)
        ]
    return Fit(entries=tuple(entries), residual=float(np.sqrt(lost / size)) if size > 0 else 0.0)


def fit_one(blocks: Sequence[Block], chosen: Callable[[Label], bool]) -> tuple[float, float]:
    """The one coefficient that all *chosen* terms have, if all others are right; and what that leaves unexplained.

    It tells where several coefficients would not: where terms depend on one another.
    """
    fixed, moved, size = [], [], 0.0
    for block in blocks:
        mask = np.array([chosen(label) for label in block.labels])
        fixed.append(block.observed - (block.right * ~mask) @ block.vectors)
        moved.append((block.right * mask) @ block.vectors)
        size += max(float((block.observed**2).sum()), float((block.expected**2).sum()))
    wanted, term = np.concatenate(fixed), np.concatenate(moved)
    weight = float(term @ term)
    if weight <= 1e-12 * size:
        return 1.0, np.inf
    factor = float(term @ wanted) / weight
    return factor, float(np.linalg.norm(wanted - factor * term) / np.sqrt(size))


def _common(labels: Sequence[Label]) -> Label:
    """What all of the labels have in common."""
    if len(labels) == 1:
        return labels[0]
    first, *others = [vars(label) for label in labels]
    return Label(**{name: value for name, value in first.items() if all(other[name] == value for other in others)})
