# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hyperep_torch.once import once_differentiable
from hyperep_torch.products import (
    Runs,
    aligned,
    columns_product,
    has_native_kernel,
    is_aligned,
    is_turned,
    rows_product,
)
from hyperep_torch.wanted import wanted_gradients

__all__ = ["check_operands", "grouped_matmul", "has_native_kernel"]


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_sizes: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Multiply runs of rows by their own matrix, and add their own bias: ``F.linear`` for each run.

    Where no native kernel is used the sizes are read on the host; see :func:`has_native_kernel`. Neither a weight of
    either layout nor its gradient is copied, except on CUDA for widths that are no multiple of 16 bytes.

    Args:
        x: rows ``[N, A]``, sorted by group.
        weight: ``[L, B, A]``, as ``nn.Linear`` keeps it; ``[L, A, B]`` if *transposed*.
        group_sizes: int32 or int64 ``[L]``: how many rows each group gets. They sum to ``N``, and may be zero.
        bias: ``[L, B]``.
        transposed: whether *weight* has the input features before the output's.

    Returns:
        ``[N, B]`` in the dtype of *x*, or of autocast. Differentiable in *x*, *weight* and *bias*; the gradients of a
        group without rows are zero.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the sizes do not sum to the rows.

    Example:
        >>> import torch, hyperep_torch as hep
        >>> x, sizes = torch.ones(3, 2), torch.tensor([1, 2])
        >>> weight, bias = torch.tensor([1.0, 10.0]).reshape(2, 1, 1).expand(2, 2, 4), torch.zeros(2, 4)
        >>> hep.grouped_matmul(x, weight, sizes, bias=bias, transposed=True)[:, 0]
        tensor([ 2., 20., 20.])
    """
    if transposed and weight.ndim == 3:
        weight = weight.transpose(1, 2)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    check_operands(x, weight, group_sizes, bias)
    native = has_native_kernel(x.device, x.dtype)
    if not native or is_aligned(x.dtype, *weight.shape[1:]):
        return _GroupedMatmul.apply(x, weight, bias, group_sizes, native)
    if x.device.type == "cpu":
        # Here the native kernel is itself a loop, and reading the sizes is free.
        return _GroupedMatmul.apply(x, weight, bias, group_sizes, False)
    features, multiple = weight.shape[1], _multiple(x.dtype)
    padded_in, padded_out = -x.shape[1] % multiple, -features % multiple
    x, weight = F.pad(x, (0, padded_in)), F.pad(weight, (0, padded_in, 0, padded_out))
    bias = None if bias is None else F.pad(bias, (0, padded_out))
    return _GroupedMatmul.apply(x, weight, bias, group_sizes, True)[:, :features]


class _GroupedMatmul(torch.autograd.Function):
    """Keeps the rows, the weight and where groups end."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        group_sizes: torch.Tensor,
        native: bool,
    ) -> torch.Tensor:
        runs = Runs.of(group_sizes, native=native, rows=x.shape[0])
        x, weight = aligned(x), weight if is_turned(weight) else aligned(weight)
        ctx.save_for_backward(x, weight, runs.stops)
        ctx.sizes, ctx.native = runs.sizes, native
        product = rows_product(x, weight.transpose(1, 2), runs)
        if bias is None:
            return product
        owners = torch.repeat_interleave(group_sizes, output_size=x.shape[0])
        return bias.index_select(0, owners).add_(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, stops = ctx.saved_tensors
        runs, g = Runs(stops, ctx.sizes, ctx.native), aligned(g)
        need_x, need_weight, need_bias = wanted_gradients(ctx)[:3]
        grad_x = rows_product(g, weight, runs) if need_x else None
        grad_weight = None
        if need_weight:
            # In the memory layout of the weight, so that it becomes the gradient as it is.
            turned = is_turned(weight)
            grad_weight = columns_product(x, g, runs).transpose(1, 2) if turned else columns_product(g, x, runs)
        grad_bias = None
        if need_bias:
            # A product with ones: sums in a fixed order, in float32 at least, and without a sync of their own.
            ones = g.new_ones((g.shape[0], _multiple(g.dtype) if ctx.native else 1))
            grad_bias = columns_product(ones, g, runs)[:, 0].contiguous()
        return grad_x, grad_weight, grad_bias, None, None


def check_operands(
    x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Shapes and dtypes that fit together, or a ``ValueError``."""
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or group_sizes.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_matmul of x {tuple(x.shape)}, weight {tuple(weight.shape)} and group_sizes "
            f"{tuple(group_sizes.shape)}; they must be [N, D], [L, H, D] and [L]. A weight [L, D, H] is given with "
            "transposed=True"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"grouped_matmul of weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; the bias must be [L, H]"
        )
    if len({tensor.dtype for tensor in (x, weight, bias) if tensor is not None}) != 1:
        biased = "" if bias is None else f", bias in {bias.dtype}"
        raise ValueError(f"grouped_matmul of x in {x.dtype} and weight in {weight.dtype}{biased}; cast to one dtype")


def _multiple(dtype: torch.dtype) -> int:
    """Elements to which the native kernel wants widths aligned."""
    return 16 // dtype.itemsize
