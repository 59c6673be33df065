# SPDX-License-Identifier: Apache-2.0
"""Batches: a pure function of seed and step, so that every rank and every platform cuts the same ones."""

from __future__ import annotations

import numpy as np

__all__ = ["global_batch", "own_part"]


def global_batch(tokens: np.ndarray, *, seed: int, step: int, sequences: int, seq_len: int) -> np.ndarray:
    """The batch of one step, over all ranks: int64 ``[sequences, seq_len + 1]``, cut at random places of the text.

    The last column is only predicted. Depends on nothing but the arguments, so a resumed run goes on with the data
    that it would have had.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, size=sequences)
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def own_part(batch: np.ndarray, part: int, parts: int) -> np.ndarray:
    """The sequences of one of *parts* equal parts, in order."""
    size = len(batch) // parts
    return batch[part * size : (part + 1) * size]
