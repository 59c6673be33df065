# SPDX-License-Identifier: Apache-2.0
"""Permutations of rows on Ascend: npu_moe_token_unpermute, and PyTorch's own gather where it takes an input not."""

from __future__ import annotations

from typing import Any

import torch
from hyperep_torch import rows
from hyperep_torch.autodiff import custom_vjp

from hyperep_torch_npu.operators import take_rows, takes_rows

__all__ = ["permute_rows"]


def permute_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for a permutation; the backward is the gather by *inverse*."""
    if not takes_rows(x):
        return rows.permute_rows(x, index, inverse)
    return custom_vjp(_forward, _backward)(x, index, inverse)


def _forward(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    return take_rows(x, index), (inverse,)


def _backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
    return take_rows(cotangents[0].contiguous(), residuals[0]), None, None
