# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product: ``torch.nn.functional.grouped_mm`` where it is native, else a loop over the groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["grouped_matmul", "has_native_kernel"]

_ALIGNMENT = 16
"""Bytes to which grouped_mm wants its rows aligned."""


def has_native_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm takes *dtype* on *device* without waiting for the device.

    On CUDA PyTorch has a kernel for bfloat16 on compute capability 9.0 and later; whatever else it accepts there, it
    computes by a loop that copies the sizes to the host.
    """
    if not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16)
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    return False


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply runs of rows by the transpose of their own matrix: ``[N, D] x [L, H, D] -> [N, H]``.

    Where no native kernel is used the sizes are read on the host; see :func:`has_native_kernel`.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight, group_sizes)
    if not has_native_kernel(x.device, x.dtype):
        return _LoopedMatmul.apply(x, weight, group_sizes)
    multiple = _ALIGNMENT // x.element_size()
    padded_in, padded_out = -x.shape[1] % multiple, -weight.shape[1] % multiple
    if not padded_in and not padded_out:
        return _NativeMatmul.apply(x, weight, group_sizes)
    if x.device.type == "cpu":
        # Here the native kernel is itself a loop, and reading the sizes is free.
        return _LoopedMatmul.apply(x, weight, group_sizes)
    x, weight = F.pad(x, (0, padded_in)), F.pad(weight, (0, padded_in, 0, padded_out))
    return _NativeMatmul.apply(x, weight, group_sizes)[:, : weight.shape[1] - padded_out]


class _NativeMatmul(torch.autograd.Function):
    """Three calls of grouped_mm; the host knows nothing of the sizes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        # grouped_mm takes the stops of the groups, and int32 only.
        stops = torch.cumsum(group_sizes, 0, dtype=torch.int32)
        x, weight = _aligned(x), _aligned(weight)
        ctx.save_for_backward(x, weight, stops)
        if not x.shape[0]:
            return x.new_empty((0, weight.shape[1]))
        return F.grouped_mm(x, weight.transpose(1, 2), offs=stops)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, stops = ctx.saved_tensors
        if not x.shape[0]:
            return torch.zeros_like(x), torch.zeros_like(weight), None
        g = _aligned(g)
        grad_x = F.grouped_mm(g, weight, offs=stops) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        grad_weight = F.grouped_mm(g.t(), x, offs=stops)  # [L, H, D]
        if g.device.type != "cpu":
            # Some kernels leave the product of a group without rows uninitialised, and it may be NaN.
            empty = torch.diff(stops, prepend=stops.new_zeros(1)) == 0
            grad_weight.masked_fill_(empty[:, None, None], 0)
        return grad_x, grad_weight, None


class _LoopedMatmul(torch.autograd.Function):
    """One matrix product a group, written into one result; exact in every dtype. Host sync in forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = group_sizes.tolist()  # host sync here
        if sum(ctx.sizes) != x.shape[0]:
            raise ValueError(f"group_sizes={ctx.sizes} sum to {sum(ctx.sizes)}, but there are {x.shape[0]} rows")
        output = x.new_empty((x.shape[0], weight.shape[1]))
        for group, rows in _runs(ctx.sizes):
            torch.mm(x[rows], weight[group].t(), out=output[rows])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        # Zeros, because groups without rows are not visited.
        grad_weight = weight.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        for group, rows in _runs(ctx.sizes):
            if grad_x is not None:
                torch.mm(g[rows], weight[group], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(g[rows].t(), x[rows], out=grad_weight[group])
        return grad_x, grad_weight, None


def _runs(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    """Number and rows of each group that has any."""
    start = 0
    for group, size in enumerate(sizes):
        if size:
            yield group, slice(start, start + size)
        start += size


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """*x*, copied unless its rows are contiguous and start where the kernel can read them."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _check(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_matmul of x {tuple(x.shape)}, weight {tuple(weight.shape)} and group_sizes "
            f"{tuple(group_sizes.shape)}; they must be [N, D], [L, H, D] and [L]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_matmul of x in {x.dtype} and weight in {weight.dtype}; cast one of them")
