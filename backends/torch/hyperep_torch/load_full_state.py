# SPDX-License-Identifier: Apache-2.0
"""The way back of whole weights: from rank 0 into a sharded model, each rank's part in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.full_state import SAVED_AS
from hyperep_torch.stacked import StackedExperts, laid_out_as

__all__ = ["load_full_state_dict"]


def load_full_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`hyperep_torch.full_state_dict` gave, whatever the model's degree is now.

    Collective over all ranks. *state* is read on rank 0 alone, and is left as it is. Tensors are sent one at a time, so
    that a device holds one whole tensor at most. Experts that :func:`hyperep_torch.stack_experts` made one module are
    read under the names that they had in their list. Values are cast to the model's dtypes.

    Raises:
        ValueError: on every rank, and nothing was loaded: names are missing or are too many, shapes differ, a tensor is
            on ``meta``, or a module's weights are saved in another form than it has, as some of transformers'.

    Example:
        >>> import torch, hyperep_torch as hep
        >>> layer = hep.stack_experts(torch.nn.Linear(2, 2) for _ in range(3))
        >>> hep.load_full_state_dict(layer, {name: 0 * t for name, t in hep.full_state_dict(layer).items()})
        >>> layer.weight.abs().sum().item()
        0.0
    """
    held = model.state_dict()
    first = not dist.is_initialized() or dist.get_rank() == 0
    listed = _listed(model)
    told: list[Any] = [None, None]
    if first:
        problem = _problem(model, held, listed, state)
        told = [problem, None if problem else {name: state[name] for name, v in held.items() if not _is_tensor(v)}]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    problem, others = told
    if problem:
        raise ValueError(f"load_full_state_dict: {problem}; nothing was loaded")
    devices = [torch.device(t.device_mesh.device_type) for t in held.values() if isinstance(t, DTensor)]
    with torch.no_grad():
        for name, target in held.items():
            if not _is_tensor(target):
                continue
            device = devices[0] if devices else target.device
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
            if first:
                whole.copy_(torch.stack([state[key] for key in listed[name]]) if name in listed else state[name])
            if dist.is_initialized():
                dist.broadcast(whole, 0)
            target.copy_(laid_out_as(target, whole))
    if others:
        model.load_state_dict(others, strict=False)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _listed(model: nn.Module) -> dict[str, list[str]]:
    """Under which names the experts of a stack are saved, by the name of what they are stacked in."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, StackedExperts):
            prefix = f"{path}." if path else ""
            for name in module.state_dict(keep_vars=True):
                found[prefix + name] = [f"{prefix}{number}.{name}" for number in range(module.num_stacked)]
    return found


def _problem(
    model: nn.Module, held: Mapping[str, Any], listed: Mapping[str, list[str]], state: Mapping[str, Any]
) -> str | None:
    """Why *state* cannot be loaded."""
    shaped = [path for path, module in model.named_modules() if getattr(module, SAVED_AS, None)]
    if shaped:
        return f"weights of {shaped} are saved in another form than they have; read them with from_pretrained"
    if meta := [name for name, value in held.items() if _is_tensor(value) and value.is_meta]:
        return f"{meta} are on meta; call model.to_empty(device=...) first"
    wanted = {name: listed.get(name, [name]) for name in held}
    keys = {key for names in wanted.values() for key in names}
    if keys != state.keys():
        return f"missing are {sorted(keys - state.keys())}, and unexpected {sorted(state.keys() - keys)}"
    for name, names in wanted.items():
        shape = held[name].shape[1:] if name in listed else getattr(held[name], "shape", None)
        for key in names:
            if _is_tensor(held[name]) and getattr(state[key], "shape", None) != shape:
                return f"{key} is {getattr(state[key], 'shape', type(state[key]))}, and {tuple(shape)} in the model"
    return None
