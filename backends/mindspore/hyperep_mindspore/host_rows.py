# SPDX-License-Identifier: Apache-2.0
"""Gathers of rows, and sums of them, by NumPy; see :mod:`hyperep_mindspore.host`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor

from hyperep_mindspore.autodiff import custom_vjp
from hyperep_mindspore.host import from_array, opened, widened

__all__ = ["sum_rows", "take"]


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Gather along *axis* by one-dimensional *indices*; what is gathered twice gets the sum of both gradients."""
    shape, dtype = x.shape, x.dtype

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return from_array(opened(x).take(opened(indices), axis=axis), dtype), ()

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Tensor, ...]:
        terms = np.moveaxis(widened(cotangents[0]), axis, 0)
        total = np.zeros((shape[axis], *terms.shape[1:]), terms.dtype)
        _add_rows(total, opened(indices), terms)
        return (from_array(np.moveaxis(total, 0, axis), dtype),)

    return custom_vjp(forward, backward)(x)


def _add_rows(total: np.ndarray, indices: np.ndarray, terms: np.ndarray) -> None:
    """Add row ``i`` of *terms* to row ``indices[i]`` of *total*, zeros before: in order, for each of them."""
    order = np.argsort(indices, kind="stable")
    found, starts = np.unique(indices[order], return_index=True)
    if found.size:
        total[found] = np.add.reduceat(terms[order], starts, axis=0)


def sum_rows(x: Tensor, index: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    """``sum over k of weights[t, k] * x[index[t, k]]``, in float32 at least; see the protocol.

    One term of all tokens at a time, so that nothing of the size of all terms is made.
    """
    (rows, width), (tokens, terms), dtype = x.shape, index.shape, x.dtype

    def terms_of(x: np.ndarray, places: np.ndarray) -> Iterator[np.ndarray]:
        """``[T, D]`` for each ``k``, zeros for a token without a row there."""
        for k in range(terms):
            if not rows:
                yield np.zeros((tokens, width), x.dtype)
                continue
            found = x.take(places[:, k], axis=0, mode="clip")
            if rows < tokens * terms:
                found[places[:, k] >= rows] = 0  # the last row was taken there, which may be NaN
            yield found

    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        given, places = widened(x), opened(index)
        factors = [_named(w, places, rows) for w in weights]
        total = np.zeros((tokens, width), np.result_type(given, *factors))  # weights may be wider than rows
        for k, found in enumerate(terms_of(given, places)):
            for factor in factors:
                found = found.astype(total.dtype, copy=False)
                found *= factor[:, k, None]
            total += found
        return from_array(total, dtype), (x, *weights) if weights else ()

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        g, entry = widened(cotangents[0]), opened(inverse)
        if not residuals:
            return (from_array(g.take(entry // terms, axis=0), dtype),)
        (x, w), places = residuals, opened(index)
        factor = _named(w, places, rows)
        grad_x = grad_w = None
        if needed[0]:
            by_row = g.take(entry // terms, axis=0).astype(np.result_type(g, factor), copy=False)  # [N, D]
            by_row *= factor.reshape(-1)[entry][:, None]
            grad_x = from_array(by_row, dtype)
        if needed[1]:
            by_term = [np.einsum("td,td->t", found, g) for found in terms_of(widened(x), places)]
            grad_w = from_array(np.stack(by_term, axis=1), w.dtype)
        return grad_x, grad_w

    return custom_vjp(forward, backward)(x, *(() if weights is None else (weights,)))


def _named(weights: Tensor, places: np.ndarray, rows: int) -> np.ndarray:
    """Weights, and zero where there is no row: what stands there may be anything, also NaN."""
    return np.where(places < rows, widened(weights), 0)
