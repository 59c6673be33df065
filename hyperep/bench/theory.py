# SPDX-License-Identifier: Apache-2.0
"""What must be moved, whatever the implementation."""

from __future__ import annotations

import numpy as np

from hyperep.exchange.row_input import HEADER

__all__ = ["wire_bytes"]


def wire_bytes(counts: np.ndarray, row_bytes: int) -> int:
    """Bytes that all ranks together send to others in a layer's forward and backward.

    A row that lives on another rank travels there and back, and so does its gradient. Beside them each rank tells each
    other one its counts, and a header of a few integers by which errors become known.

    Args:
        counts: rows by source, owner and expert of the owner, ``[R, R, L]``.
        row_bytes: size of one row.
    """
    ranks, _, local = counts.shape
    travelling = int(counts.sum() - np.trace(counts.sum(axis=2)))
    return 4 * travelling * row_bytes + ranks * (ranks - 1) * (local + HEADER) * 8
