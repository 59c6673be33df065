# SPDX-License-Identifier: Apache-2.0
"""SwiGLU between the products, elementwise and outside autograd; one kernel where Triton compiles for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hyperep_torch import kernels

__all__ = ["packed_swiglu", "packed_swiglu_backward", "swiglu", "swiglu_backward"]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    if kernels.usable(gate):
        return kernels.load().swiglu(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(
    grad_hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The hidden rows once more, and the gradients of *gate* and *up*; *grad_hidden* is overwritten."""
    if kernels.usable(gate):
        return kernels.load().swiglu_backward(grad_hidden, gate, up)
    grad_up = F.silu(gate)
    hidden = grad_up * up
    grad_up.mul_(grad_hidden)
    grad_hidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_hidden, gate, grad_input=grad_hidden)
    return hidden, grad_hidden, grad_up


def packed_swiglu(both: torch.Tensor) -> torch.Tensor:
    """:func:`swiglu` of gates and what is gated, side by side: ``[N, 2 H] -> [N, H]``."""
    gate, up = both.chunk(2, dim=1)
    if _lies_well(both):
        return swiglu(gate, up)
    return swiglu(gate.contiguous(), up.contiguous())


def packed_swiglu_backward(grad_hidden: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden rows once more, and the gradient of *both*; *grad_hidden* is overwritten."""
    gate, up = both.chunk(2, dim=1)
    if not _lies_well(both):
        hidden, *halves = swiglu_backward(grad_hidden, gate.contiguous(), up.contiguous())
        return hidden, torch.cat(halves, dim=1)
    grad_both = torch.empty_like(both)
    grad_gate, grad_up = grad_both.chunk(2, dim=1)
    hidden = F.silu(gate)
    torch.mul(hidden, grad_hidden, out=grad_up)
    hidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
    return hidden, grad_both


def _lies_well(both: torch.Tensor) -> bool:
    """Whether halves are read and written where they lie: by a processor's passes, not by kernels of a device."""
    return both.device.type == "cpu" and not kernels.usable(both)
