# SPDX-License-Identifier: Apache-2.0
"""Products of runs of rows with their own matrices: by MindSpore on any device, and by NumPy in the host's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, ops

from hyperep_mindspore.host import from_array, widened

__all__ = ["BY_MINDSPORE", "BY_NUMPY", "Products", "Runs", "product_by_run", "products_of_runs", "read_runs"]

Runs = list[tuple[int, int, int]]
"""Group, first row and end of each group that has rows."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """What grouped products are made of. Between ``open`` and ``close`` values are of a kind of its own."""

    groups: Callable[[Tensor, int], Any]
    """Sizes of groups and the number of rows, as ``by_run`` and ``outer`` want them."""
    open: Callable[[Tensor], Any]
    """A tensor as such a value, which nobody writes into."""
    close: Callable[[Any, Any], Tensor]
    """A value as a tensor of a dtype."""
    by_run: Callable[..., Any]
    """``(rows, weight, groups, *, transpose)``: each run times its own matrix, or the transpose: ``[N, M]``."""
    outer: Callable[[Any, Any, Any, Any], Any]
    """``(g, x, weight, groups)``, the gradient of the weights: ``g^T x`` of each run, zeros for groups without rows."""
    sigmoid: Callable[[Any], Any]


def read_runs(group_sizes: Tensor, rows: int) -> Runs:
    """The runs, read on the host.

    Raises:
        ValueError: the sizes do not sum to the rows.
    """
    sizes = group_sizes.asnumpy()  # host sync here
    stops = np.cumsum(sizes).tolist()
    if (stops[-1] if stops else 0) != rows:
        raise ValueError(f"group_sizes={sizes.tolist()} sum to {stops[-1:]}, but there are {rows} rows")
    return [(e, stop - int(n), stop) for e, (n, stop) in enumerate(zip(sizes, stops, strict=True)) if n]


def product_by_run(rows: Tensor, weight: Tensor, runs: Runs, *, transpose: bool) -> Tensor:
    """A loop of products; see :attr:`Products.by_run`."""
    width = weight.shape[1] if transpose else weight.shape[2]
    if not runs or not rows.shape[1]:
        # MindSpore leaves the product over an empty dim as it was in memory.
        return ops.zeros((rows.shape[0], width), rows.dtype)
    parts = [ops.matmul(rows[a:b], weight[e].T if transpose else weight[e]) for e, a, b in runs]
    return parts[0] if len(parts) == 1 else ops.cat(parts, 0)


def products_of_runs(g: Tensor, x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """A loop of products; see :attr:`Products.outer`."""
    products = {e: ops.matmul(g[a:b].T, x[a:b]) for e, a, b in runs}
    if not products:
        return ops.zeros(weight.shape, weight.dtype)
    nothing = ops.zeros(weight.shape[1:], weight.dtype)
    return ops.stack([products.get(e, nothing) for e in range(weight.shape[0])], 0)


def _host_by_run(rows: np.ndarray, weight: np.ndarray, runs: Runs, *, transpose: bool) -> np.ndarray:
    matrices = weight.transpose(0, 2, 1) if transpose else weight  # BLAS reads a transposed one as it lies
    out = np.empty((rows.shape[0], matrices.shape[2]), rows.dtype)
    for e, a, b in runs:
        np.matmul(rows[a:b], matrices[e], out=out[a:b])
    return out


def _host_outer(g: np.ndarray, x: np.ndarray, weight: np.ndarray, runs: Runs) -> np.ndarray:
    out = np.zeros(weight.shape, x.dtype)
    for e, a, b in runs:
        np.matmul(g[a:b].T, x[a:b], out=out[e])
    return out


def _host_sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, by tanh, which overflows nowhere."""
    y = np.tanh(0.5 * x)
    y *= 0.5
    y += 0.5
    return y


BY_MINDSPORE = Products(
    groups=read_runs,
    open=lambda x: x,
    close=lambda x, dtype: x,
    by_run=product_by_run,
    outer=products_of_runs,
    sigmoid=ops.sigmoid,
)
BY_NUMPY = Products(
    groups=read_runs,
    open=widened,
    close=from_array,
    by_run=_host_by_run,
    outer=_host_outer,
    sigmoid=_host_sigmoid,
)
