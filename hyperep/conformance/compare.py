# SPDX-License-Identifier: Apache-2.0
"""Comparisons that say what differs: shape, dtype, where, how much."""

from __future__ import annotations

import numpy as np

__all__ = ["near", "same"]


def same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Raise unless shape, dtype and every value agree."""
    _shape(got, want, what)
    if got.dtype != want.dtype:
        raise AssertionError(f"{what}: dtype {got.dtype}, must be {want.dtype}")
    wrong = np.argwhere(got != want)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {got.size} values differ; at {list(at)} it is {got[at]}, must be {want[at]}"
            f"\ngot  {_short(got)}\nwant {_short(want)}"
        )


def near(got: np.ndarray, want: np.ndarray, what: str, tolerance: float) -> None:
    """Raise unless shapes agree and the largest error is at most *tolerance* of the largest value.

    Where everything should be zero, everything must be: a result of zeros never passes for small numbers.
    """
    _shape(got, want, what)
    if not got.size:
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not np.isfinite(got).all():
        raise AssertionError(f"{what}: {np.count_nonzero(~np.isfinite(got))} values are NaN or infinite")
    scale = np.abs(want).max()
    error = np.abs(got - want)
    if error.max() > tolerance * scale:
        at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what}: relative error {error.max() / scale if scale else np.inf:.3g} (tolerance {tolerance:g}); "
            f"at {list(at)} it is {got[at]:.7g}, must be {want[at]:.7g}"
        )


def _shape(got: np.ndarray, want: np.ndarray, what: str) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {list(got.shape)}, must be {list(want.shape)}")


def _short(array: np.ndarray) -> str:
    return np.array2string(array.ravel(), threshold=24, edgeitems=10, max_line_width=10_000)
