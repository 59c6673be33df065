# SPDX-License-Identifier: Apache-2.0
"""Rows that change their places, differentiable: every backward is a gather, never a scatter with additions."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hyperep_torch import kernels

__all__ = ["gather_rows", "permute_rows"]


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]``, outside autograd."""
    if kernels.usable(x):
        return kernels.load().gather_rows(x.contiguous(), index)
    return x.index_select(0, index)


def permute_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for a permutation; the backward is the gather by *inverse*."""
    return _PermuteRows.apply(x, index, inverse)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return gather_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_rows(g, *ctx.saved_tensors), None, None
