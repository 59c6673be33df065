# SPDX-License-Identifier: Apache-2.0
"""``custom_vjp`` and ``vjp`` on torch.autograd."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hyperep.platform.protocol import Backward, Forward
from hyperep_torch.once import once_differentiable
from hyperep_torch.wanted import wanted_gradients

__all__ = ["custom_vjp", "vjp"]


class _CustomVjp(torch.autograd.Function):
    """One call of a function made by :func:`custom_vjp`.

    Residuals go through ``save_for_backward`` and not through a closure, so that activation checkpointing and
    saved-tensor hooks see them, and memory is freed with the graph. Cotangents of outputs that were not used are
    materialised as zeros by PyTorch.
    """

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *inputs: torch.Tensor) -> Any:
        outputs, residuals = forward(*inputs)
        ctx.save_for_backward(*residuals)
        ctx.pullback = backward
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = wanted_gradients(ctx, first=2)
        gradients = ctx.pullback(ctx.saved_tensors, cotangents, needed)
        return (None, None, *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)))


def custom_vjp(forward: Forward, backward: Backward) -> Callable[..., Any]:
    """A differentiable function made of *forward* and *backward*; see the protocol."""

    def function(*inputs: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return _CustomVjp.apply(forward, backward, *inputs)
        before, _unrecorded.calls = _unrecorded.calls, _unrecorded.calls + 1
        try:
            return _CustomVjp.apply(forward, backward, *inputs)
        finally:
            _unrecorded.calls = before

    return function


class _Unrecorded(threading.local):
    """In how many custom forwards this thread is whose backward nobody will call."""

    calls = 0


_unrecorded = _Unrecorded()


def vjp(
    function: Callable[..., Any], *primals: torch.Tensor, parameters: Sequence[torch.Tensor] = ()
) -> tuple[Any, Callable[..., tuple[torch.Tensor, ...]]]:
    """Evaluate *function* and return its outputs and its pullback; see the protocol."""
    if _unrecorded.calls:
        # Most likely nobody pulls back; whoever does has it recorded then.
        plain = tuple(p.detach() for p in primals)
        return function(*plain), lambda *cotangents: _recorded(function, plain, parameters)(*cotangents)
    # Leaves of their own: the gradients end here, and the same tensor given twice counts as two inputs.
    leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in primals]
    with torch.enable_grad():
        outputs = function(*leaves)
    outputs_given = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = [*leaves, *parameters]
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]

    def pullback(*cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(cotangents) != len(outputs_given):
            raise ValueError(f"{len(cotangents)} cotangents for {len(outputs_given)} outputs; give one for each")
        used = [(o, c) for o, c in zip(outputs_given, cotangents, strict=True) if o.requires_grad]
        found: dict[int, torch.Tensor | None] = {}
        if used and wanted:
            gradients = torch.autograd.grad(
                [o for o, _ in used], [inputs[i] for i in wanted], [c for _, c in used], allow_unused=True
            )
            found = dict(zip(wanted, gradients, strict=True))
        return tuple(_local_gradient(x, found.get(i)) for i, x in enumerate(inputs))

    # An enclosing vjp takes what this one returns for constants: its graph ends with its own pullback.
    detached = tuple(o.detach() for o in outputs_given)
    return detached if isinstance(outputs, tuple) else detached[0], pullback


def _recorded(
    function: Callable[..., Any], primals: tuple[torch.Tensor, ...], parameters: Sequence[torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    before, _unrecorded.calls = _unrecorded.calls, 0
    try:
        return vjp(function, *primals, parameters=parameters)[1]
    finally:
        _unrecorded.calls = before


def _local_gradient(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(x.to_local() if isinstance(x, DTensor) else x, requires_grad=False)
    if isinstance(gradient, DTensor):
        # The gradient of a replicated parameter may still be a pending sum over ranks.
        return gradient.redistribute(placements=x.placements).to_local()  # type: ignore[attr-defined]
    return gradient
