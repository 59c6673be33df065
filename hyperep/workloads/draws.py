# SPDX-License-Identifier: Apache-2.0
"""Draws of ``K`` experts for each of ``T`` tokens: evenly, by popularity, or with a share for a group of them.

Letters: ``T`` tokens, ``E`` experts, ``K`` choices of a token. All return int64 ``[T, K]``.
"""

from __future__ import annotations

import numpy as np

__all__ = ["by_popularity", "evenly", "repeating", "with_group"]


def evenly(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts, all equally likely."""
    return _smallest(rng.random((tokens, experts)), top_k)


def by_popularity(rng: np.random.Generator, tokens: int, popularity: np.ndarray, top_k: int) -> np.ndarray:
    """Distinct experts, drawn one after the other in proportion to *popularity* ``[E]``, which is above zero."""
    # A race: waiting times with these rates come in first, second, ... with just these probabilities.
    waiting = -np.log1p(-rng.random((tokens, len(popularity)))) / popularity
    return _smallest(waiting, top_k)


def with_group(
    rng: np.random.Generator, tokens: int, experts: int, top_k: int, *, group: np.ndarray, share: float
) -> np.ndarray:
    """Distinct experts; those in *group* get the part *share* of all choices, beside their even part of the rest.

    As far as a token can: of a small group it has each expert once and no more.
    """
    inside = np.zeros(experts, dtype=bool)
    inside[group] = True
    size = int(inside.sum())
    likely = share + (1 - share) * size / experts
    wanted = (rng.random((tokens, top_k)) < likely).sum(axis=1)  # [T]: how many of a token's choices are in the group
    keys = rng.random((tokens, experts))
    for of, quota in ((inside, wanted[:, None]), (~inside, top_k - wanted[:, None])):
        place = keys[:, of].argsort(axis=1).argsort(axis=1)
        keys[:, of] += place >= quota  # behind all others; so they come in only where one side is too small
    return _smallest(keys, top_k)


def repeating(rng: np.random.Generator, tokens: int, experts: int, top_k: int, *, hot: int, share: float) -> np.ndarray:
    """As :func:`evenly`, but the part *share* of all choices is replaced by one of the first *hot* experts.

    So a token may have a hot expert several times: one expert cannot otherwise get more than ``1 / K`` of the choices.
    """
    flat = evenly(rng, tokens, experts, top_k).ravel()
    taken = rng.permutation(len(flat))[: round(len(flat) * share)]
    flat[taken] = rng.integers(0, hot, size=len(taken))
    return flat.reshape(tokens, top_k)


def _smallest(keys: np.ndarray, top_k: int) -> np.ndarray:
    """The places of the *top_k* smallest of each row, smallest first."""
    found = keys.argpartition(top_k - 1, axis=1)[:, :top_k]
    order = np.take_along_axis(keys, found, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1).astype(np.int64)
