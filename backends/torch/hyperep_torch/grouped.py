# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hyperep_torch.products import (
    Runs,
    aligned,
    columns_product,
    has_native_kernel,
    is_aligned,
    is_turned,
    rows_product,
)

__all__ = ["check_operands", "grouped_matmul", "has_native_kernel"]


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply runs of rows by the transpose of their own matrix: ``[N, D] x [L, H, D] -> [N, H]``.

    Where no native kernel is used the sizes are read on the host; see :func:`has_native_kernel`. A weight that is kept
    as ``[L, D, H]`` is given as its transposed view; neither it nor its gradient is copied.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    check_operands(x, weight, group_sizes)
    native = has_native_kernel(x.device, x.dtype)
    if not native or is_aligned(x.dtype, *weight.shape[1:]):
        return _GroupedMatmul.apply(x, weight, group_sizes, native)
    if x.device.type == "cpu":
        # Here the native kernel is itself a loop, and reading the sizes is free.
        return _GroupedMatmul.apply(x, weight, group_sizes, False)
    multiple = 16 // x.element_size()
    padded_in, padded_out = -x.shape[1] % multiple, -weight.shape[1] % multiple
    x, weight = F.pad(x, (0, padded_in)), F.pad(weight, (0, padded_in, 0, padded_out))
    return _GroupedMatmul.apply(x, weight, group_sizes, True)[:, : weight.shape[1] - padded_out]


class _GroupedMatmul(torch.autograd.Function):
    """Keeps the rows, the weight and where groups end."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor, native: bool
    ) -> torch.Tensor:
        runs = Runs.of(group_sizes, native=native, rows=x.shape[0])
        x, weight = aligned(x), weight if is_turned(weight) else aligned(weight)
        ctx.save_for_backward(x, weight, runs.stops)
        ctx.sizes, ctx.native = runs.sizes, native
        return rows_product(x, weight.transpose(1, 2), runs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, stops = ctx.saved_tensors
        runs, g = Runs(stops, ctx.sizes, ctx.native), aligned(g)
        grad_x = rows_product(g, weight, runs) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            # In the memory layout of the weight, so that it becomes the gradient as it is.
            turned = is_turned(weight)
            grad_weight = columns_product(x, g, runs).transpose(1, 2) if turned else columns_product(g, x, runs)
        return grad_x, grad_weight, None, None


def check_operands(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> None:
    """Shapes and dtypes that fit together, or a ``ValueError``."""
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_matmul of x {tuple(x.shape)}, weight {tuple(weight.shape)} and group_sizes "
            f"{tuple(group_sizes.shape)}; they must be [N, D], [L, H, D] and [L]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_matmul of x in {x.dtype} and weight in {weight.dtype}; cast one of them")
