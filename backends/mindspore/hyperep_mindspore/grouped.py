# SPDX-License-Identifier: Apache-2.0
"""Grouped products as one custom function each: a loop over the groups that have rows.

MindSpore has a grouped kernel on Ascend only, which this package does not call yet. The loop reads the sizes on the
host. Differentiating ``weight[e]`` in it would make a full-size zero gradient for every group; here the backward
stacks one product per group instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, ops

from hyperep_mindspore.autodiff import custom_vjp

__all__ = ["grouped_matmul", "grouped_swiglu"]

Runs = list[tuple[int, int, int]]
"""Group, first row and end of each group that has rows."""


def grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """``[N, D] x [L, H, D] -> [N, H]``; see the protocol."""
    runs = _runs(x, group_sizes)

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _products(x, weight, runs, transpose=True), (x, weight)

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        (x, weight), (g,) = residuals, cotangents
        grad_x = _products(g, weight, runs, transpose=False) if needed[0] else None
        return grad_x, _outer_products(g, x, weight, runs) if needed[1] else None

    return custom_vjp(forward, backward)(x, weight)


def grouped_swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, group_sizes: Tensor) -> Tensor:
    """``(silu(x w1^T) * (x w3^T)) w2^T`` for each run of rows; see the protocol.

    Keeps the rows and the two projections; the hidden rows are computed again in backward, which is elementwise.
    """
    runs = _runs(x, group_sizes)

    def forward(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate = _products(x, w1, runs, transpose=True)  # [N, H]
        up = _products(x, w3, runs, transpose=True)  # [N, H]
        return _products(gate * ops.sigmoid(gate) * up, w2, runs, transpose=True), (x, w1, w2, w3, gate, up)

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        (x, w1, w2, w3, gate, up), (g,) = residuals, cotangents
        slope = ops.sigmoid(gate)
        silu = gate * slope
        grad_hidden = _products(g, w2, runs, transpose=False)  # [N, H]
        # d silu(z) / dz = s + z * s * (1 - s), where s is the sigmoid of z.
        grad_gate = grad_hidden * up * slope * (1.0 + gate * (1.0 - slope))
        grad_up = grad_hidden * silu
        grad_x = None
        if needed[0]:
            grad_x = _products(grad_gate, w1, runs, transpose=False) + _products(grad_up, w3, runs, transpose=False)
        return (
            grad_x,
            _outer_products(grad_gate, x, w1, runs) if needed[1] else None,
            _outer_products(g, silu * up, w2, runs) if needed[2] else None,
            _outer_products(grad_up, x, w3, runs) if needed[3] else None,
        )

    return custom_vjp(forward, backward)(x, w1, w2, w3)


def _runs(x: Tensor, group_sizes: Tensor) -> Runs:
    sizes = group_sizes.asnumpy()
    stops = np.cumsum(sizes).tolist()
    if (stops[-1] if stops else 0) != x.shape[0]:
        raise ValueError(f"group_sizes={sizes.tolist()} sum to {stops[-1:]}, but there are {x.shape[0]} rows")
    return [(e, stop - int(n), stop) for e, (n, stop) in enumerate(zip(sizes, stops, strict=True)) if n]


def _products(rows: Tensor, weight: Tensor, runs: Runs, *, transpose: bool) -> Tensor:
    """Each run times its own matrix, or the transpose of it: ``[N, K] -> [N, M]``."""
    width = weight.shape[1] if transpose else weight.shape[2]
    if not runs or not rows.shape[1]:
        # MindSpore leaves the product over an empty dim as it was in memory.
        return ops.zeros((rows.shape[0], width), rows.dtype)
    parts = [ops.matmul(rows[a:b], weight[e].T if transpose else weight[e]) for e, a, b in runs]
    return parts[0] if len(parts) == 1 else ops.cat(parts, 0)


def _outer_products(g: Tensor, x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """The gradient of the weights: ``g^T x`` of each run, zeros for groups without rows."""
    products = {e: ops.matmul(g[a:b].T, x[a:b]) for e, a, b in runs}
    if not products:
        return ops.zeros(weight.shape, weight.dtype)
    nothing = ops.zeros(weight.shape[1:], weight.dtype)
    return ops.stack([products.get(e, nothing) for e in range(weight.shape[0])], 0)
