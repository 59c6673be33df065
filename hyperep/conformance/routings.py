# SPDX-License-Identifier: Apache-2.0
"""Adversarial routings: how many rows each rank has for each expert, ``[R, E]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["ROUTINGS", "splits"]

Routing = Callable[[np.random.Generator, int, int], np.ndarray]


def _balanced(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    return np.full((ranks, experts), 2)


def _random(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    return rng.integers(0, 4, size=(ranks, experts))


def _hot_expert(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = np.zeros((ranks, experts), dtype=np.int64)
    counts[:, experts // 2] = 300 + np.arange(ranks)  # more than a tile of a kernel
    return counts


def _hot_rank(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = np.zeros((ranks, experts), dtype=np.int64)
    local = experts // ranks
    counts[:, -local:] = rng.integers(100, 140, size=(ranks, local))
    return counts


def _empty_rank(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = rng.integers(1, 4, size=(ranks, experts))
    counts[0] = 0  # rank 0 sends nothing, and (unless it is alone) ...
    if ranks > 1:
        counts[:, : experts // ranks] = 0  # ... nothing is sent to it
    return counts


def _empty_expert(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = rng.integers(1, 4, size=(ranks, experts))
    counts[:, [0, experts - 1]] = 0
    return counts


def _all_empty(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    return np.zeros((ranks, experts), dtype=np.int64)


def _one_row(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = np.zeros((ranks, experts), dtype=np.int64)
    counts[ranks - 1, 0] = 1
    return counts


ROUTINGS: dict[str, tuple[Routing, str]] = {
    "balanced": (_balanced, "every expert gets two rows from every rank"),
    "random": (_random, "rows are spread at random, some experts get none from some ranks"),
    "hot-expert": (_hot_expert, "all rows go to one expert"),
    "hot-rank": (_hot_rank, "all rows go to the experts of one rank"),
    "empty-rank": (_empty_rank, "one rank sends no row and receives none"),
    "empty-expert": (_empty_expert, "two experts get no row from anybody"),
    "all-empty": (_all_empty, "no rank has any row"),
    "one-row": (_one_row, "there is one row in all"),
}
"""Name -> the function that makes the counts, and what is special about them."""


def splits(counts: np.ndarray) -> np.ndarray:
    """Rows that go from each rank to each rank, ``[R, R]``, for counts ``[R, E]``."""
    ranks = len(counts)
    return counts.reshape(ranks, ranks, -1).sum(axis=2)
