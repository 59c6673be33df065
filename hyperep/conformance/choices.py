# SPDX-License-Identifier: Apache-2.0
"""Adversarial choices of experts: for each rank, which experts each of its tokens goes to, ``[T, K]``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["CHOICES", "TOP_K", "copies"]

Choices = Callable[[np.random.Generator, int, int], list[np.ndarray]]

TOP_K = 3


def _different(rng: np.random.Generator, tokens: int, experts: int) -> np.ndarray:
    """``[T, K]``, no expert twice in a row."""
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :TOP_K]


def _random(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    return [_different(rng, 5 + r, experts) for r in range(ranks)]


def _duplicates(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    found = _random(rng, ranks, experts)
    for indices in found:
        indices[0] = indices[0, 0]
        indices[1::2, 2] = indices[1::2, 0]
    return found


def _nobody(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    found = _random(rng, ranks, experts)
    for indices in found:
        indices[rng.random(indices.shape) < 0.4] = experts
        indices[2] = experts
    return found


def _nowhere(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    return [np.full((3 + r, TOP_K), experts) for r in range(ranks)]


def _hot_rank(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    local = experts // ranks
    return [experts - local + _different(rng, 4 + r, local) for r in range(ranks)]


def _empty_rank(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    away = 0 if ranks == 1 else experts // ranks  # nothing goes to rank 0 either, unless it is alone
    return [away + _different(rng, 4 * (r > 0), experts - away) for r in range(ranks)]


def _all_empty(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    return [np.zeros((0, TOP_K), dtype=np.int64)] * ranks


def _one_token(rng: np.random.Generator, ranks: int, experts: int) -> list[np.ndarray]:
    found = _all_empty(rng, ranks, experts)
    return [*found[:-1], _different(rng, 1, experts)]


CHOICES: dict[str, tuple[Choices, str]] = {
    "random": (_random, "each token goes to experts at random, no two of them the same"),
    "duplicates": (_duplicates, "tokens choose an expert two or three times"),
    "nobody": (_nobody, "choices are nobody, the number of experts, and one token goes nowhere"),
    "nowhere": (_nowhere, "no token goes anywhere"),
    "hot-rank": (_hot_rank, "all tokens go to the experts of one rank"),
    "empty-rank": (_empty_rank, "one rank has no token, and gets none"),
    "all-empty": (_all_empty, "no rank has any token"),
    "one-token": (_one_token, "there is one token in all"),
}
"""Name -> the function that makes the choices of all ranks, and what is special about them."""


def copies(indices: np.ndarray, ranks: int, experts: int) -> np.ndarray:
    """Which tokens go to which rank, bool ``[T, R]``: those of which it owns an expert."""
    owner = indices // (experts // ranks)
    return (owner[:, :, None] == np.arange(ranks)).any(axis=1)
