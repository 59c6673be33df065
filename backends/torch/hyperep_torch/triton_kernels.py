# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA: row gathers and the elementwise part of SwiGLU, each one pass over memory.

All of them are bound by memory: each row is read once and written once, by consecutive threads. Arithmetic is float32.
"""

# ruff: noqa: N803 (compile-time parameters of kernels are upper-case in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["clear_empty_groups_", "gather_rows", "sum_rows", "sum_rows_backward", "swiglu", "swiglu_backward"]

_WIDTH = 2048
"""Most elements of a row that one program instance handles at a time."""


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for contiguous rows ``[M, ...]`` and an integer index ``[N]``."""
    output = x.new_empty((index.shape[0], *x.shape[1:]))
    width = x[0].numel() if x.shape[0] else 0
    if output.numel():
        block = _block(width)
        grid = (index.shape[0], triton.cdiv(width, block))
        _gather_rows[grid](x, index, output, width, BLOCK=block, num_warps=_warps(block))
    return output


def sum_rows(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``out[t] = sum_k weights[t, k] * rows[index[t, k]]``: ``[N, D], [T, K] -> [T, D]``; unweighted for ``None``.

    An entry of the index that is no row (``N`` or more) adds nothing.
    """
    tokens, terms = index.shape
    output = rows.new_empty((tokens, rows.shape[1]))
    if output.numel():
        block = _block(rows.shape[1])
        grid = (tokens, triton.cdiv(rows.shape[1], block))
        _sum_rows[grid](
            rows, index, index if weights is None else weights, output, rows.shape[0], rows.shape[1],
            TERMS=terms, WEIGHTED=weights is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return output


def sum_rows_backward(
    g: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of *rows* and *weights* in :func:`sum_rows`, where *index* names every row exactly once."""
    tokens, terms = index.shape
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if not grad_rows.numel():
        grad_weights.zero_()
    else:
        block = triton.next_power_of_2(rows.shape[1])  # a whole row, because its dot product is taken
        _sum_rows_backward[(tokens,)](
            g, rows, index, weights, grad_rows, grad_weights, rows.shape[0], rows.shape[1],
            TERMS=terms, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad_rows, grad_weights.zero_() if not grad_rows.numel() else grad_weights


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of contiguous tensors."""
    output = torch.empty_like(gate)
    size = gate.numel()
    if size:
        _swiglu[(triton.cdiv(size, _WIDTH),)](gate, up, output, size, BLOCK=_WIDTH, num_warps=8)
    return output


def swiglu_backward(
    grad_hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The hidden rows and the gradients of *gate*, which overwrites *grad_hidden*, and *up*."""
    hidden, grad_up = torch.empty_like(gate), torch.empty_like(gate)
    size = gate.numel()
    if size:
        _swiglu_backward[(triton.cdiv(size, _WIDTH),)](
            grad_hidden, gate, up, hidden, grad_up, size, BLOCK=_WIDTH, num_warps=8
        )
    return hidden, grad_hidden, grad_up


def clear_empty_groups_(product: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Write zeros into ``product[l]`` for each group without rows; the others are not even read. In place."""
    groups, width = product.shape[0], product[0].numel() if product.shape[0] else 0
    if product.numel():
        _clear_empty_groups[(groups, triton.cdiv(width, 8 * _WIDTH))](product, stops, width, BLOCK=8 * _WIDTH)
    return product


def _block(width: int) -> int:
    return min(triton.next_power_of_2(width), _WIDTH)


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


@triton.jit
def _gather_rows(x, index, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    tl.store(output + row * width + column, tl.load(x + source * width + column, mask=inside), mask=inside)


@triton.jit
def _sum_rows(
    rows, index, weights, output, count, width, TERMS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TERMS):
        source = tl.load(index + token * TERMS + k).to(tl.int64)
        named = source < count
        there = column < tl.where(named, width, 0)
        term = tl.load(rows + source * width + column, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            # Chosen and not multiplied: a weight that belongs to no row may be anything.
            term = term * tl.where(named, tl.load(weights + token * TERMS + k).to(tl.float32), 0.0)
        total += term
    tl.store(output + token * width + column, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows_backward(
    g, rows, index, weights, grad_rows, grad_weights, count, width, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    cotangent = tl.load(g + token * width + column, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TERMS):
        source = tl.load(index + token * TERMS + k).to(tl.int64)
        named = source < count
        there = column < tl.where(named, width, 0)
        weight = tl.load(weights + token * TERMS + k).to(tl.float32)
        row = tl.load(rows + source * width + column, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_rows + source * width + column, (cotangent * weight).to(grad_rows.dtype.element_ty), mask=there)
        dot = tl.where(named, tl.sum(cotangent * row, axis=0), 0.0)
        tl.store(grad_weights + token * TERMS + k, dot.to(grad_weights.dtype.element_ty))


@triton.jit
def _swiglu(gate, up, output, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, (z * tl.sigmoid(z) * u).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad_hidden, gate, up, hidden, grad_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad_hidden + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.sigmoid(z)
    silu = z * slope
    tl.store(hidden + at, (silu * u).to(hidden.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (g * silu).to(grad_up.dtype.element_ty), mask=inside)
    grad_gate = g * u * slope * (1.0 + z * (1.0 - slope))
    tl.store(grad_hidden + at, grad_gate.to(grad_hidden.dtype.element_ty), mask=inside)


@triton.jit
def _clear_empty_groups(product, stops, width, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(stops + group - 1, mask=group > 0, other=0)
    if tl.load(stops + group) == start:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(product + group * width + column, tl.zeros((BLOCK,), product.dtype.element_ty), mask=column < width)
