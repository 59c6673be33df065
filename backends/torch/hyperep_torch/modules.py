# SPDX-License-Identifier: Apache-2.0
"""Native modules around a neutral forward, and shards in the place of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep import distribute
from hyperep.platform.protocol import Platform
from hyperep.sharding import Sharding
from hyperep_torch.kept_state import KeepsState
from hyperep_torch.local_parts import local_part
from hyperep_torch.opened import OpensItself, own_parts

__all__ = [
    "LocalView",
    "NeutralModule",
    "OpensItself",
    "is_laid_out",
    "own_copy",
    "replace_by_shard",
]

_SHARD = "_hyperep_shard"
"""Attribute of a parameter that was replaced: its shard, for other modules that hold the same parameter."""


class NeutralModule(OpensItself, KeepsState, nn.Module):
    """A module whose computation is a neutral ``forward(m, *inputs, **kwargs)``; see the protocol's ``make_module``."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, torch.Tensor],
        forward: Callable[..., Any],
        children: Mapping[str, nn.Module],
        buffers: Mapping[str, torch.Tensor],
        description: str,
    ) -> None:
        super().__init__()
        self._neutral_name = name
        self._neutral_forward = forward
        self._neutral_description = description
        # Cloned, because two modules made from the same tensors must not train each other.
        for key, value in parameters.items():
            self.register_parameter(key, nn.Parameter(value.detach().clone()))
        for key, value in buffers.items():
            self.register_buffer(key, value.detach().clone())
        for key, child in children.items():
            self.register_module(key, child)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the neutral forward on the local tensors as they are at this call."""
        return self._neutral_forward(LocalView(self), *inputs, **kwargs)

    def extra_repr(self) -> str:
        """What the module prints between its brackets."""
        return self._neutral_description

    def _get_name(self) -> str:
        return self._neutral_name


class LocalView:
    """What a neutral forward sees of its module, for the time of one call.

    Attributes are looked up when first used, so that ``functional_call`` and FSDP2, which swap parameters around a
    call, are seen; then they are kept. DTensors among the parameters are opened first, all at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(own_parts(module), _module=module)

    def __getattr__(self, name: str) -> Any:
        value = local_part(getattr(self._module, name))
        self.__dict__[name] = value
        return value


def is_laid_out(platform: Platform[Any], module: nn.Module, name: str, sharding: Sharding) -> bool:
    """Whether a module's own parameter or buffer *name* is a DTensor of that layout already.

    Raises:
        ValueError: it is, but FSDP2's, which puts the whole in its place while the module is called.
    """
    held = {**module._parameters, **module._buffers}.get(name)
    if not isinstance(held, DTensor) or not distribute.is_laid_out(platform, held, sharding.mesh, sharding.placements):
        return False
    if getattr(module, "_is_fsdp_managed_module", False):
        raise ValueError(
            f"parameter {name!r} of {type(module).__name__} is distributed already, by FSDP2; apply styles first, and "
            "fully_shard afterwards"
        )
    return True


def own_copy(local: torch.Tensor) -> torch.Tensor:
    """A copy, because a slice would keep the memory of the whole parameter."""
    return local.detach().clone(memory_format=torch.contiguous_format)


def replace_by_shard(module: nn.Module, name: str, make: Callable[[], DTensor]) -> None:
    """Put a DTensor in the place of a module's own parameter or buffer *name*, wherever in it the same one is held.

    It gets the attributes that somebody has set on the parameter. Another module that holds the same parameter gets the
    same DTensor when it is asked for the same layout; what cannot be kept is warned of.

    Raises:
        ValueError: the module has none of that name; or another module has the parameter laid out in another way.
    """
    parameters, buffers = (dict(named(recurse=False)) for named in (module.named_parameters, module.named_buffers))
    if name in buffers:
        module.register_buffer(name, make(), persistent=name not in module._non_persistent_buffers_set)
        return
    if name not in parameters:
        raise ValueError(
            f"{type(module).__name__} has no parameter {name!r} of its own; it has {sorted(parameters | buffers)}"
        )
    whole = parameters[name]
    shard = whole.__dict__.get(_SHARD)
    made = make()
    if shard is None:
        shard = nn.Parameter(made, requires_grad=whole.requires_grad)
        shard.__dict__.update(whole.__dict__)
        whole.__dict__[_SHARD] = shard
        _warn_of_what_is_lost(name, whole)
    elif (shard.device_mesh, shard.placements) != (made.device_mesh, made.placements):
        raise ValueError(
            f"parameter {name!r} of {type(module).__name__} is shared with another module, where it is laid out as "
            f"{list(shard.placements)} over {shard.device_mesh}, and not as {list(made.placements)} over "
            f"{made.device_mesh}; lay it out alike, or untie the two before"
        )
    for key, held in module._parameters.items():
        if held is whole:
            module.register_parameter(key, shard)


def _warn_of_what_is_lost(name: str, whole: nn.Parameter) -> None:
    hooks = [*(whole._backward_hooks or ()), *(getattr(whole, "_post_accumulate_grad_hooks", None) or ())]
    lost = [what for what, there in (("hooks", hooks), ("a gradient", whole.grad is not None)) if there]
    if lost:
        warnings.warn(
            f"parameter {name!r} has {' and '.join(lost)}, which its shard does not get: their shapes are those of the "
            "whole; register hooks after the style was applied, and take the first gradient then",
            stacklevel=5,
        )
