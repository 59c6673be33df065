# SPDX-License-Identifier: Apache-2.0
"""Backwards that are no functions of PyTorch: whoever differentiates a gradient is told so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["once_differentiable"]

_MESSAGE = (
    "a second derivative through hyperep's exchanges or products: each has one written backward (once_differentiable), "
    "which itself has none; leave the mixture of experts out of what is differentiated twice, or detach its gradient"
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a backward as one that cannot be differentiated.

    PyTorch's decorator of that name lets a gradient pass for a constant where no incoming gradient asks for another
    derivative, as that of a sum does not: a penalty on gradients then loses its gradients without a word. Where
    somebody makes a graph of the backward, all that comes out of this one raises when it is differentiated.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *cotangents: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *cotangents)
        with torch.no_grad():
            gradients = backward(ctx, *cotangents)
        several = isinstance(gradients, tuple)
        refusing = torch._C._functions.DelayedError(_MESSAGE.encode(), len(gradients) if several else 1)
        refused = refusing(*(_asking(g) for g in (gradients if several else (gradients,))))
        return refused if several else refused[0]

    return wrapped


def _asking(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.detach().requires_grad_()
