# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rows and their gradients, outside autograd, without a buffer of all the weighted rows.

On CUDA one Triton kernel each way. On the CPU the forward is PyTorch's ``embedding_bag``, which gathers, weights and
adds in one pass: the rows are its table, and the rows of a token its bag.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hyperep_torch import kernels

__all__ = ["can_fuse", "sum_rows", "sum_rows_backward"]


def can_fuse(x: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether the functions here take these. On the CPU no narrow dtypes: sums would be taken in them."""
    on_cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return kernels.usable(x) or (on_cpu and (weights is None or weights.dtype == x.dtype))


def sum_rows(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * rows[index[t, k]]``: ``[N, D], [T, K] -> [T, D]``; unweighted for ``None``."""
    if kernels.usable(rows):
        return kernels.load().sum_rows(rows, index, weights)
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


def sum_rows_backward(
    g: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of *rows* and *weights* in :func:`sum_rows`, where row ``i`` is entry ``inverse[i]`` of *index*."""
    if kernels.usable(rows):
        return kernels.load().sum_rows_backward(g, rows, index, weights)
    tokens, terms = index.shape
    token = inverse // max(terms, 1)
    grad_rows = g.index_select(0, token).mul_(weights.reshape(-1, 1).index_select(0, inverse))
    # The dot product of each row with its token's cotangent; what PyTorch's own backward of embedding_bag calls.
    first = torch.arange(0, tokens * terms, max(terms, 1), device=g.device)
    grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g, rows, index.reshape(-1), first, torch.arange(tokens, device=g.device).repeat_interleave(terms), 0
    )
    return grad_rows, grad_weights.reshape(tokens, terms)
