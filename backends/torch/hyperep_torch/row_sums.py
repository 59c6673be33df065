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


def can_fuse(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether the functions here take these. On the CPU no narrow dtypes: sums would be taken in them."""
    if not index.shape[1]:
        return False
    return kernels.usable(x) or _in_bags(x, weights)


def _in_bags(x: torch.Tensor, weights: torch.Tensor | None) -> bool:
    """Whether ``embedding_bag`` of the CPU takes rows and weights, and adds up in no narrower dtype than theirs."""
    on_cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return on_cpu and (weights is None or weights.dtype == x.dtype)


def sum_rows(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * rows[index[t, k]]``: ``[N, D], [T, K] -> [T, D]``; unweighted for ``None``.

    An entry of the index that is no row (``N`` or more) adds nothing.
    """
    if kernels.usable(rows):
        return kernels.load().sum_rows(rows, index, weights)
    if rows.shape[0] == index.numel():
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)
    named = index < rows.shape[0]  # [T, K]
    sizes = named.sum(1)
    of_rows = None if weights is None else weights[named]
    return F.embedding_bag(index[named], rows, sizes.cumsum(0) - sizes, mode="sum", per_sample_weights=of_rows)


def sum_rows_backward(
    g: torch.Tensor,
    rows: torch.Tensor | None,
    index: torch.Tensor,
    inverse: torch.Tensor,
    weights: torch.Tensor,
    needs_rows: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of *rows*, if needed, and of *weights*, if the rows are there.

    Row ``i`` is entry ``inverse[i]`` of the flattened *index*.
    """
    if rows is not None and kernels.usable(rows):
        return kernels.load().sum_rows_backward(g, rows, index, weights)
    token = inverse // index.shape[1]  # [N] the sum that each row goes into
    each = torch.arange(len(token), dtype=token.dtype, device=token.device)
    grad_rows = grad_weights = None
    if needs_rows:
        own = weights.reshape(-1).index_select(0, inverse)
        if _in_bags(g, own):
            # Gathered and weighted in one pass: bags of one row each.
            grad_rows = F.embedding_bag(token, g, each, mode="sum", per_sample_weights=own)
        else:
            grad_rows = g.index_select(0, token).mul_(own[:, None])
    if rows is not None:
        # The dot product of each row with its token's cotangent, without a buffer of products: what PyTorch's own
        # backward of embedding_bag calls, here for rows in their own order.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, each, each, token, 0)  # [N]
        grad_weights = weights.new_zeros(weights.numel()).index_copy_(0, inverse.long(), dots).view_as(weights)
    return grad_rows, grad_weights
