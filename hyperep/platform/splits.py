# SPDX-License-Identifier: Apache-2.0
"""The check of the splits of an all-to-all that platforms share, so that bad ones are told in the same words."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["row_splits"]


def row_splits(name: str, splits: Sequence[int] | None, size: int, rows: int | None) -> list[int]:
    """How many rows go to, or come from, each of *size* ranks.

    Args:
        name: of the argument, for the error.
        splits: as the caller gave them; ``None`` splits *rows* evenly.
        size: number of ranks in the group.
        rows: number of rows; needed where *splits* is ``None``.

    Raises:
        ValueError: the rows do not divide evenly; or there is not one non-negative number for each rank.
    """
    if splits is None:
        assert rows is not None
        if rows % size:
            raise ValueError(f"{name}: {rows} rows do not divide evenly among {size} ranks; pad them or give splits")
        return [rows // size] * size
    counts = [int(count) for count in splits]
    if len(counts) != size or min(counts) < 0:
        raise ValueError(f"{name}={counts} must hold one non-negative number of rows for each of {size} ranks")
    return counts
