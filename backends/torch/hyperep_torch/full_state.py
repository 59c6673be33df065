# SPDX-License-Identifier: Apache-2.0
"""Whole weights of a sharded model, under the names and in the shapes that it had before anything was done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.stacked import StackedExperts

__all__ = ["SAVED_AS", "full_state_dict", "gathered", "saved_otherwise"]

SAVED_AS = "_hyperep_saved_as"
"""Attribute of a module: how whole tensors of its own parameters, by name, become what the model's checkpoints hold."""


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, on the host of rank 0; empty on all others.

    Collective over all ranks. Tensors are gathered one at a time, so that a device holds one whole tensor at most.
    Experts that :func:`hyperep_torch.stack_experts` made one module have the names that they had in their list.

    Example:
        >>> import torch, hyperep_torch as hep
        >>> list(hep.full_state_dict(hep.stack_experts(torch.nn.Linear(2, 2, bias=False) for _ in range(3))))
        ['0.weight', '1.weight', '2.weight']
    """
    return gathered(model, model.state_dict())


def gathered(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`full_state_dict` of the entries *state* of the model's own."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    saved_as = saved_otherwise(model)
    whole: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        entries = saved_as[name](value) if name in saved_as else {name: value}
        if first:
            whole |= {
                key: v.detach().to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for key, v in entries.items()
            }
    return whole


def saved_otherwise(model: nn.Module) -> dict[str, Callable[[torch.Tensor], Mapping[str, Any]]]:
    """What becomes of entries of the state dict that are saved otherwise, by their names."""
    found: dict[str, Callable[[torch.Tensor], Mapping[str, Any]]] = {}

    def reshaped(name: str, shaped: Callable[[torch.Tensor], torch.Tensor]) -> None:
        found[name] = lambda whole: {name: shaped(whole)}

    def listed(prefix: str, name: str, stack: StackedExperts) -> None:
        found[prefix + name] = lambda whole: {prefix + key: v for key, v in stack.unstacked(name, whole).items()}

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, shaped in getattr(module, SAVED_AS, {}).items():
            reshaped(prefix + name, shaped)
        if isinstance(module, StackedExperts):
            for name in module.state_dict(keep_vars=True):
                listed(prefix, name, module)
    return found
