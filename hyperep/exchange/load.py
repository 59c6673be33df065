# SPDX-License-Identifier: Apache-2.0
"""How a step's load was spread over experts and over ranks: figures as a value, from counts that are on the host."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hyperep.exchange.balance import Placement

__all__ = ["LoadFigures", "load_figures"]


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """Figures of one layer in one step. A row is one choice of one token."""

    expert_max_over_mean: float
    """Rows of the busiest expert over the mean; 1 is even, and so is a layer without rows."""
    expert_variation: float
    """Coefficient of variation: the standard deviation of experts' rows over their mean; 0 is even."""
    expert_entropy: float
    """Shannon entropy of the experts' shares over that of even ones, ``ln E``; 1 is even, 0 is one expert alone."""
    dead_experts: int
    """Experts without rows."""
    rank_rows: tuple[int, ...]
    """Rows that each rank computes, ``[R]``."""
    rank_max_over_mean: float
    """Rows of the busiest rank over the mean: how much longer than even the experts take, since all wait for it."""
    rows_crossed: int
    """Rows that are computed on another rank than that of their token."""
    copies: int
    """Copies of experts that were made."""
    rows_saved: int
    """By how many rows the busiest rank has fewer than it would without copies."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as what ``json`` can hold."""
        return asdict(self) | {"rank_rows": list(self.rank_rows)}


def load_figures(counts: np.ndarray, placement: Placement | None = None, *, spread: bool = True) -> LoadFigures:
    """The figures of counts that all ranks know.

    Args:
        counts: choices by the token's rank and by expert, integers ``[R, E]``; rank ``r`` owns ``r * E / R`` and
            following.
        placement: what was computed elsewhere than at an expert's owner; left out, nothing.
        spread: whether ranks own experts; otherwise every rank computes its own tokens' rows, as where experts are
            sliced.

    Raises:
        ValueError: the experts do not divide by the ranks, or the placement is of other counts.
    """
    counts = np.asarray(counts, dtype=np.int64)
    ranks, experts = counts.shape
    if spread and experts % ranks:
        raise ValueError(f"counts of {experts} experts on {ranks} ranks: they must divide")
    if placement is not None and not (spread and np.array_equal(placement.counts, counts)):
        raise ValueError("the placement was planned for other counts; give those that it was planned for")
    loads = counts.sum(axis=0)
    own, crossed = _computed(counts) if spread else (counts.sum(axis=1), 0)
    rows = own
    if placement is not None:
        rows = np.array(placement.loads, dtype=np.int64)
        crossed += _crossed_more(placement)
    return LoadFigures(
        expert_max_over_mean=_max_over_mean(loads),
        expert_variation=float(loads.std() / loads.mean()) if loads.any() else 0.0,
        expert_entropy=_entropy(loads),
        dead_experts=int((loads == 0).sum()),
        rank_rows=tuple(rows.tolist()),
        rank_max_over_mean=_max_over_mean(rows),
        rows_crossed=crossed,
        copies=0 if placement is None else len(placement.copies),
        rows_saved=int(own.max() - rows.max()),
    )


def _computed(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of each owner, int64 ``[R]``, and how many of all come from other ranks."""
    between = counts.reshape(len(counts), len(counts), -1).sum(axis=2)  # [R, R], by source and owner
    return between.sum(axis=0), int(between.sum() - np.trace(between))


def _crossed_more(placement: Placement) -> int:
    """How many more rows cross because copies take them; fewer, where a copy is on the rank of its tokens."""
    more = 0
    for copy, taken in zip(placement.copies, placement.taken, strict=True):
        more += int(taken[copy.expert // placement.owned]) - int(taken[copy.rank])
    return more


def _max_over_mean(rows: np.ndarray) -> float:
    return float(rows.max() / rows.mean()) if rows.any() else 1.0


def _entropy(loads: np.ndarray) -> float:
    shares = loads[loads > 0] / max(loads.sum(), 1)
    return float(-(shares * np.log(shares)).sum() / np.log(len(loads))) if len(shares) and len(loads) > 1 else 1.0
