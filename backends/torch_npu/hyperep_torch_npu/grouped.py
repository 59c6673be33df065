# SPDX-License-Identifier: Apache-2.0
"""Grouped matrix product on Ascend: npu_grouped_matmul, and PyTorch's own products where it takes an input not.

torch_npu has no gradient for its operator; the two products of the backward are grouped products too.
"""

from __future__ import annotations

from typing import Any

import torch
from hyperep_torch import grouped
from hyperep_torch.autodiff import custom_vjp

from hyperep_torch_npu.operators import grouped_columns_product, grouped_rows_product, takes_groups

__all__ = ["grouped_matmul"]


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply runs of rows by the transpose of their own matrix: ``[N, D] x [L, H, D] -> [N, H]``.

    The sizes are not read on the host, unless it takes PyTorch's own products.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    grouped.check_operands(x, weight, group_sizes)
    if weight.shape[0] == 1:
        # Some of CANN's documents forbid a list of one group, and nothing is grouped then.
        return x @ weight[0].t()
    if not takes_groups(x, weight):
        return grouped.grouped_matmul(x, weight, group_sizes)
    return custom_vjp(_forward, _backward)(x, weight, group_sizes)


def _forward(x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    stops = torch.cumsum(group_sizes, 0, dtype=torch.int64)
    return grouped_rows_product(x, weight.transpose(1, 2), stops), (x, weight, stops)


def _backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Any, ...]:
    (x, weight, stops), (g,) = residuals, cotangents
    grad_x = grouped_rows_product(g, weight, stops) if needed[0] else None
    grad_weight = grouped_columns_product(g, x, stops) if needed[1] else None
    return grad_x, grad_weight, None
