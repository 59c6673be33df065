# SPDX-License-Identifier: Apache-2.0
"""The experts' feed-forward networks as one autograd function.

Kept for backward: the rows ``[N, D]``, the two projections ``[N, H]``, the weights, and where groups end ``[L]``. The
hidden rows are computed again, by one elementwise pass.
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
    rows_product_add_,
)
from hyperep_torch.wanted import wanted_gradients

__all__ = ["can_fuse", "grouped_swiglu", "swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; see the protocol."""
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return activation.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A copy, because the cotangent belongs to others and is overwritten.
        _, grad_gate, grad_up = activation.swiglu_backward(
            g.clone(memory_format=torch.contiguous_format), *ctx.saved_tensors
        )
        return grad_gate, grad_up


def can_fuse(x: torch.Tensor, w1: torch.Tensor) -> bool:
    """Whether :func:`grouped_swiglu` takes these. It takes all on the CPU; elsewhere what grouped_mm takes unpadded."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return x.device.type == "cpu" or (has_native_kernel(x.device, dtype) and is_aligned(dtype, *w1.shape[1:]))


def grouped_swiglu(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, group_sizes: torch.Tensor
) -> torch.Tensor:
    """``(silu(x w1^T) * (x w3^T)) w2^T`` for each run of rows; see the protocol.

    Args:
        x: rows ``[N, D]``, sorted by expert.
        w1: the gates, ``[L, H, D]``.
        w2: the way back, ``[L, D, H]``.
        w3: what is gated, ``[L, H, D]``.
        group_sizes: int32 or int64 ``[L]``, how many rows each expert gets; they sum to ``N``.

    Returns:
        ``[N, D]``. Differentiable in *x* and the weights.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the sizes do not sum to the rows.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, w2, w3 = (t.to(dtype) for t in (x, w1, w2, w3))
    _check(x, w1, w2, w3, group_sizes)
    native = has_native_kernel(x.device, x.dtype) and is_aligned(x.dtype, *w1.shape[1:])
    return _GroupedSwiglu.apply(x, w1, w2, w3, group_sizes, native)


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        w3: torch.Tensor,
        group_sizes: torch.Tensor,
        native: bool,
    ) -> torch.Tensor:
        runs = Runs.of(group_sizes, native=native, rows=x.shape[0])
        x, w1, w2, w3 = aligned(x), aligned(w1), aligned(w2), aligned(w3)
        gate = rows_product(x, w1.transpose(1, 2), runs)  # [N, H]
        up = rows_product(x, w3.transpose(1, 2), runs)  # [N, H]
        ctx.save_for_backward(x, gate, up, w1, w2, w3, runs.stops)
        ctx.sizes, ctx.native = runs.sizes, native
        return rows_product(activation.swiglu(gate, up), w2.transpose(1, 2), runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, w1, w2, w3, stops = ctx.saved_tensors
        runs, g = Runs(stops, ctx.sizes, ctx.native), aligned(g)
        need_x, need_w1, need_w2, need_w3 = wanted_gradients(ctx)[:4]
        hidden, grad_gate, grad_up = activation.swiglu_backward(rows_product(g, w2, runs), gate, up)
        grad_w2 = columns_product(g, hidden, runs) if need_w2 else None
        del hidden, g  # each as large as an input: free for what follows
        grad_w1 = columns_product(grad_gate, x, runs) if need_w1 else None
        grad_w3 = columns_product(grad_up, x, runs) if need_w3 else None
        if not need_x:
            return None, grad_w1, grad_w2, grad_w3, None, None
        grad_x = rows_product(grad_gate, w1, runs)
        del grad_gate
        return rows_product_add_(grad_x, grad_up, w3, runs), grad_w1, grad_w2, grad_w3, None, None


def _check(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, group_sizes: torch.Tensor) -> None:
    groups, hidden, dim = w1.shape if w1.ndim == 3 else (-1, -1, -1)
    fits = w3.shape == w1.shape and w2.shape == (groups, dim, hidden)
    if x.ndim != 2 or x.shape[1] != dim or group_sizes.shape != (groups,) or not fits:
        raise ValueError(
            f"grouped_swiglu of x {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}, w3 {tuple(w3.shape)} "
            f"and group_sizes {tuple(group_sizes.shape)}; they must be [N, D], [L, H, D], [L, D, H], [L, H, D] and [L]"
        )
    if len({x.dtype, w1.dtype, w2.dtype, w3.dtype}) != 1:
        raise ValueError(
            f"grouped_swiglu of x in {x.dtype}, w1 in {w1.dtype}, w2 in {w2.dtype}, w3 in {w3.dtype}; cast to one dtype"
        )
