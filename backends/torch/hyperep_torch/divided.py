# SPDX-License-Identifier: Apache-2.0
"""Experts all of whose gradients are divided, because they hold the tokens of several ranks.

Not where gradients of weights arrive, which are the largest tensors there are: the gradient of the experts' output is
divided on its way in, and that of their inputs multiplied on its way out. In between everything is linear in it. For a
power of two that is the same to the bit, as long as nothing is too small for its dtype; hooks on parameters would be
lost with ``module.to``, which makes new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hyperep_torch.uncompiled import call_uncompiled
from hyperep_torch.wrapped import WrappedForward, wrap_forward

__all__ = ["can_divide", "divide_gradients", "divides_gradients"]

_DIVIDES = "_hyperep_divides_gradients"
"""Attribute of a module that was divided."""


def divide_gradients(module: nn.Module, divisor: int) -> None:
    """From now on divide the gradients of all parameters in *module* by *divisor*, where its parts are called.

    These are the modules that a style was applied to. What has been divided already stays so.
    """
    if not divides_gradients(module):
        for part in _called(module):
            wrap_forward(part, functools.partial(_divided, divisor))
            wrap_forward(part, call_uncompiled)
        module.__dict__[_DIVIDES] = True


def divides_gradients(module: nn.Module) -> bool:
    """Whether :func:`divide_gradients` was called on *module*."""
    return _DIVIDES in module.__dict__


def can_divide(module: nn.Module) -> bool:
    """Whether every parameter in *module* belongs to a part that a style was applied to."""
    inside = {id(parameter) for part in _called(module) for parameter in part.parameters()}
    return all(id(parameter) in inside for parameter in module.parameters())


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The topmost modules with a style."""
    if isinstance(module, WrappedForward):
        yield module
        return
    for child in module.children():
        yield from _called(child)


def _divided(
    divisor: int, inner: Callable[..., Any], *inputs: Any, meanwhile: nn.Module | None = None, **kwargs: Any
) -> Any:
    inputs, kwargs = tree_map(functools.partial(_scaled, by=divisor, up=True), (inputs, kwargs))
    if meanwhile is not None:
        kwargs["meanwhile"] = _Undivided(meanwhile, divisor)
    return tree_map(functools.partial(_scaled, by=divisor, up=False), inner(*inputs, **kwargs))


class _Undivided(nn.Module):
    """What is computed beside experts, whose gradients are nobody else's."""

    def __init__(self, module: nn.Module, divisor: int) -> None:
        super().__init__()
        self.module, self.divisor = module, divisor

    def forward(self, x: Any) -> Any:
        """Between a multiplication and a division that undo those around it."""
        return _scaled(self.module(_scaled(x, by=self.divisor, up=False)), by=self.divisor, up=True)


def _scaled(value: Any, *, by: int, up: bool) -> Any:
    return _Scaled.apply(value, by, up) if isinstance(value, torch.Tensor) and value.requires_grad else value


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, by: int, up: bool) -> torch.Tensor:
        ctx.by, ctx.up = by, up
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient * ctx.by if ctx.up else gradient / ctx.by, None, None
