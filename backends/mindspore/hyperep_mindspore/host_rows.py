# SPDX-License-Identifier: Apache-2.0
"""Gathers of rows, and sums of them, by NumPy; see :mod:`hyperep_mindspore.host`."""

from __future__ import annotations

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
    (tokens, terms), dtype = index.shape, x.dtype

    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        factor = widened(weights[0]) if weights else None
        return from_array(_sums(widened(x), opened(index), factor), dtype), (x, *weights) if weights else ()

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        entry = opened(inverse)
        by_row = widened(cotangents[0]).take(entry // terms, axis=0)  # [N, D], of each row's token
        if not residuals:
            return (from_array(by_row, dtype),)
        (x, w), grad_x, grad_w = residuals, None, None
        if needed[1]:
            # From row to choice: what no row belongs to stays zero.
            by_choice = np.zeros(tokens * terms, by_row.dtype)
            by_choice[entry] = np.einsum("nd,nd->n", widened(x), by_row)
            grad_w = from_array(by_choice.reshape(tokens, terms), w.dtype)
        if needed[0]:
            factor = widened(w).reshape(-1)[entry]  # [N]
            by_row = by_row.astype(np.result_type(by_row, factor), copy=False)
            by_row *= factor[:, None]
            grad_x = from_array(by_row, dtype)
        return grad_x, grad_w

    return custom_vjp(forward, backward)(x, *(() if weights is None else (weights,)))


def _sums(x: np.ndarray, places: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    """``[T, D]``: the rows of *x* at each token's *places* ``[T, K]``, by *factor* ``[T, K]``, added up in their order.

    A place past the end is no row. Tokens are sorted by how many rows they have, and a token's own rows come first: the
    k-th term is then one of the first tokens alone, and what is missing is neither read nor multiplied.
    """
    present = places < x.shape[0]  # [T, K]
    counts = present.sum(axis=1)
    by_count = np.argsort(-counts, kind="stable")
    own_first = np.argsort(~present, axis=1, kind="stable")[by_count]
    places = places[by_count[:, None], own_first]
    if factor is not None:
        factor = factor[by_count[:, None], own_first]
    dtype = x.dtype if factor is None else np.result_type(x, factor)  # weights may be wider than rows
    total = np.zeros((len(places), x.shape[1]), dtype)
    for k in range(counts.max(initial=0)):
        some = np.count_nonzero(counts > k)
        found = x.take(places[:some, k], axis=0).astype(dtype, copy=False)
        if factor is not None:
            found *= factor[:some, k, None]
        total[:some] += found
    out = np.empty_like(total)
    out[by_count] = total
    return out
