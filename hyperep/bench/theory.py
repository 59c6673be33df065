# SPDX-License-Identifier: Apache-2.0
"""What must be moved, whatever the implementation."""

from __future__ import annotations

import numpy as np

from hyperep.exchange import row_input, token_input

__all__ = ["row_wire_bytes", "token_wire_bytes"]

_NUMBER = 4
"""Bytes of a number of an expert, and of a weight, on the wire."""


def token_wire_bytes(copies: np.ndarray, top_k: int, token_bytes: int, chunks: int = 1) -> int:
    """Bytes that all ranks together send to others in a layer's forward and backward where tokens travel.

    A token travels once to each other rank that owns one of its experts, and a sum back; so do their gradients. With it
    go the numbers and weights of its choices, and the gradients of those weights come back. Beside them each rank tells
    each other one how much that is, in a header by which errors become known too.

    Args:
        copies: tokens by source rank and by rank that owns one of their experts, ``[R, R]``.
        top_k: choices of a token.
        token_bytes: size of one token.
        chunks: in how many parts they travel; of each the header has its two counts.
    """
    ranks = len(copies)
    travelling = int(copies.sum() - np.trace(copies))
    return travelling * (4 * token_bytes + 3 * top_k * _NUMBER) + ranks * (ranks - 1) * token_input.header(chunks) * 8


def row_wire_bytes(counts: np.ndarray, row_bytes: int) -> int:
    """The same where rows travel: one for each choice, there and back, and so their gradients; and the counts.

    Args:
        counts: choices by source, owner and expert of the owner, ``[R, R, L]``.
        row_bytes: size of one row.
    """
    ranks, _, local = counts.shape
    travelling = int(counts.sum() - np.trace(counts.sum(axis=2)))
    return 4 * travelling * row_bytes + ranks * (ranks - 1) * (local + row_input.HEADER) * 8
