# SPDX-License-Identifier: Apache-2.0
"""Rows that change their places, differentiable: every backward is a gather, never a scatter with additions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hyperep_torch import collectives, kernels, row_sums
from hyperep_torch.once import once_differentiable

__all__ = ["exchange_rows", "gather_rows", "permute_rows", "sum_rows"]


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


def sum_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weighted sums of rows in one pass; see the protocol, and ``row_sums.can_fuse`` for what it takes."""
    if weights is None:
        return _SumRows.apply(x, index, inverse)
    return _WeightedSumRows.apply(x, index, inverse, weights)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.terms = index.shape[1]
        return row_sums.sum_rows(x.contiguous(), index.contiguous(), None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gather_rows(g, inverse // ctx.terms), None, None


class _WeightedSumRows(torch.autograd.Function):
    """Keeps the rows where weights want a gradient, which is their dot product with the cotangent."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, index, inverse, weights)
        return row_sums.sum_rows(x, index, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        x, index, inverse, weights = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weights = row_sums.sum_rows_backward(g.contiguous(), x, index, inverse, weights, needs_x)
        return grad_x, None, None, grad_weights


def exchange_rows(
    x: torch.Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: Any
) -> torch.Tensor:
    """All-to-all of rows, whose backward is the all-to-all of the cotangent with the splits exchanged."""
    return _ExchangeRows.apply(x, tuple(input_splits), tuple(output_splits), group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: Any
    ) -> torch.Tensor:
        ctx.exchange = (input_splits, output_splits, group)
        return collectives.all_to_all_single(x, output_splits, input_splits, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        input_splits, output_splits, group = ctx.exchange
        return collectives.all_to_all_single(g, input_splits, output_splits, group).wait(), None, None, None
