# SPDX-License-Identifier: Apache-2.0
"""Experts whose two projections are one weight, ``gate_up``, as one autograd function.

What :mod:`hyperep_torch.swiglu` does for three weights, with a product less each way: the rows meet both projections at
once. The weight is read as it lies, so no half of it is cut out, and its gradient is written once.
"""

from __future__ import annotations

from typing import Any

import torch

from hyperep_torch import activation
from hyperep_torch.once import once_differentiable
from hyperep_torch.products import (
    Runs,
    aligned,
    columns_product,
    has_native_kernel,
    is_aligned,
    rows_product,
)
from hyperep_torch.wanted import wanted_gradients

__all__ = ["packed_swiglu"]


def packed_swiglu(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """``(silu(x gate^T) * (x up^T)) down^T`` for each run of rows, where ``gate_up`` is gate on top of up.

    Kept for backward: the rows and both projections; the hidden rows are computed again.

    Args:
        x: rows ``[N, D]``, sorted by expert.
        gate_up: ``[L, 2 H, D]``.
        down: ``[L, D, H]``.
        group_sizes: integers ``[L]``, how many rows each expert gets; they sum to ``N``.

    Returns:
        ``[N, D]``. Differentiable in *x*, *gate_up* and *down*.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the sizes do not sum to the rows.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = (t.to(dtype) for t in (x, gate_up, down))
    groups, both, dim = gate_up.shape if gate_up.ndim == 3 else (-1, -1, -1)
    fits = not both % 2 and down.shape == (groups, dim, both // 2)
    if x.ndim != 2 or x.shape[1] != dim or group_sizes.shape != (groups,) or not fits:
        raise ValueError(
            f"packed_swiglu of x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} and "
            f"group_sizes {tuple(group_sizes.shape)}; they must be [N, D], [L, 2 H, D], [L, D, H] and [L]"
        )
    if len({x.dtype, gate_up.dtype, down.dtype}) != 1:
        raise ValueError(
            f"packed_swiglu of x in {x.dtype}, gate_up in {gate_up.dtype}, down in {down.dtype}; cast to one dtype"
        )
    native = has_native_kernel(x.device, x.dtype) and is_aligned(x.dtype, dim, both // 2)
    return _PackedSwiglu.apply(x, gate_up, down, group_sizes, native)


class _PackedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, group_sizes: torch.Tensor, native: bool
    ) -> torch.Tensor:
        runs = Runs.of(group_sizes, native=native, rows=x.shape[0])
        x, gate_up, down = aligned(x), aligned(gate_up), aligned(down)
        both = rows_product(x, gate_up.transpose(1, 2), runs)  # [N, 2 H]
        ctx.save_for_backward(x, both, gate_up, down, runs.stops)
        ctx.sizes, ctx.native = runs.sizes, native
        return rows_product(activation.packed_swiglu(both), down.transpose(1, 2), runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, gate_up, down, stops = ctx.saved_tensors
        runs, g = Runs(stops, ctx.sizes, ctx.native), aligned(g)
        need_x, need_gate_up, need_down = wanted_gradients(ctx)[:3]
        hidden, grad_both = activation.packed_swiglu_backward(rows_product(g, down, runs), both)  # [N, H], [N, 2 H]
        grad_down = columns_product(g, hidden, runs) if need_down else None
        del hidden, g  # each as large as an input: free for what follows
        grad_gate_up = columns_product(grad_both, x, runs) if need_gate_up else None
        grad_x = rows_product(grad_both, gate_up, runs) if need_x else None
        return grad_x, grad_gate_up, grad_down, None, None
