# SPDX-License-Identifier: Apache-2.0
"""LoRA by peft on the experts' own parameters (``target_parameters``), spread over ranks with the experts.

peft wraps the module of experts once for each parameter ``[E, out, in]`` and keeps two matrices beside it for all
experts together: ``lora_A [E r, in]``, expert after expert, and ``lora_B [out, r E]``, in which the experts take turns.
Each rank keeps those columns and rows that belong to its experts, as DTensors, under peft's names; so the whole is what
peft saves. In a call the sum of weight and product is what the experts see, as under peft, for this rank's experts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as NativeShard

from hyperep.distribute import distribute_parameter
from hyperep.placements import Shard
from hyperep.platform.selection import adopt_mesh
from hyperep_torch.local_parts import local_part
from hyperep_torch.opened import call_with_given
from hyperep_torch.uncompiled import call_uncompiled
from hyperep_torch.wrapped import wrap_forward

__all__ = ["require_spreadable", "shard_adapters", "spread", "unwrapped"]

_SPREAD = "_hyperep_spread_adapters"
"""Attribute of peft's wrapper: the names of its adapters that are spread."""


def shard_adapters(model: nn.Module) -> nn.Module:
    """Spread peft's adapters on experts that are spread already, in place: what to call after ``get_peft_model``.

    Where adapters are there when a style is applied, or ``expert_parallelize`` called, it is done there. Collective
    over the ranks that share the experts; all get their parts of what the first of them has. Adapters that are spread
    already stay as they are.

    Raises:
        ValueError: an adapter cannot be spread: it is on a parameter that is no ``[E, out, in]``, or the experts are
            spread in another way than over one mesh dimension. Nothing has been changed then.
    """
    inner = {id(module.base_layer) for module in model.modules() if _is_wrapper(module)}
    chains = [unwrapped(module) for module in model.modules() if _is_wrapper(module) and id(module) not in inner]
    chains = [(wrappers, experts) for wrappers, experts in chains if _is_spread(experts)]
    for wrappers, experts in chains:
        require_spreadable(wrappers, experts)
    for wrappers, experts in chains:
        spread(wrappers, experts)
    return model


def unwrapped(module: nn.Module) -> tuple[list[Any], nn.Module]:
    """Peft's wrappers around parameters of a module, the outermost first, and the module itself."""
    wrappers = []
    while _is_wrapper(module):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def require_spreadable(wrappers: Sequence[Any], experts: nn.Module) -> None:
    """Check that adapters can be spread as *experts* are, or will be over one mesh dimension.

    Raises:
        ValueError: they cannot.
    """
    for wrapper in wrappers:
        name, parameter = wrapper.parameter_name, wrapper.get_param()
        if parameter.ndim != 3 or wrapper.num_experts != parameter.shape[0]:
            raise ValueError(
                f"the adapters on {name!r} of {type(experts).__name__}, of shape {tuple(parameter.shape)}, belong to "
                "all experts together; leave it out of target_parameters, where parameters [E, out, in] can be"
            )
        if isinstance(parameter, DTensor) and list(parameter.placements) != [NativeShard(0)]:
            raise ValueError(
                f"the adapters on {name!r} of {type(experts).__name__}, which lies as {list(parameter.placements)}: "
                "adapters are spread with experts that lie over one mesh dimension and are not sliced; apply styles "
                "first, then shard_adapters, then data parallelism"
            )


def spread(wrappers: Sequence[Any], experts: nn.Module) -> None:
    """Spread what :func:`require_spreadable` has found to be so. Collective over the mesh of the experts."""
    for wrapper in wrappers:
        mesh = adopt_mesh(wrapper.get_param().device_mesh)
        done = wrapper.__dict__.get(_SPREAD, ())
        for adapter in wrapper.lora_A:
            if adapter not in done:
                distribute_parameter(wrapper.lora_A[adapter], "weight", mesh, [Shard(0)])
                # Parts of E columns, one for each of the r ranks of the matrix; of each this rank has its experts'.
                distribute_parameter(wrapper.lora_B[adapter], "weight", mesh, [Shard(1, parts=wrapper.r[adapter])])
        setattr(wrapper, _SPREAD, tuple(wrapper.lora_A))
        if not done:
            weight = wrapper.get_param()
            # Without the wrapper, of which the attribute would keep it alive until cycles are collected.
            layout = _Layout(weight.device_mesh, weight.placements, weight.to_local().detach()[:, :0, 0].clone())
            factors = (wrapper.lora_A, wrapper.lora_B, wrapper.scaling)
            wrapper.get_delta_weight = functools.partial(_product, *factors, layout, wrapper._did_swap_in_out_features)
            wrap_forward(wrapper, functools.partial(_adapted, wrapper))
            wrap_forward(wrapper, call_uncompiled)


def _adapted(
    wrapper: Any, inner: Callable[..., Any], *inputs: Any, adapter_names: Any = None, **kwargs: Any
) -> torch.Tensor:
    """In place of the wrapper's own forward, which would compute with whole matrices."""
    if adapter_names is not None:
        raise ValueError("adapters on the experts' parameters are the same for a whole batch; leave out adapter_names")
    if wrapper.disable_adapters and wrapper.merged:
        wrapper.unmerge()
    idle = wrapper.disable_adapters or wrapper.merged
    active = [] if idle else [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    left_out = [name for name in active if name not in wrapper.__dict__[_SPREAD]]
    if left_out:
        raise ValueError(
            f"the adapters {left_out} were added after others were spread; call shard_adapters(model) again"
        )
    if not active:
        return wrapper.base_layer(*inputs, **kwargs)
    _, experts = unwrapped(wrapper)
    weight = local_part(wrapper.get_param())
    for name in active:
        a, b = _factors(wrapper.lora_A[name], wrapper.lora_B[name], weight, wrapper._did_swap_in_out_features)
        with torch.autocast(weight.device.type, enabled=False):
            weight = torch.baddbmm(weight, b, a, alpha=wrapper.scaling[name])
    return call_with_given(experts, {wrapper.parameter_name: weight}, wrapper.base_layer, *inputs, **kwargs)


def _factors(lora_a: nn.Linear, lora_b: nn.Linear, weight: torch.Tensor, swapped: bool) -> tuple[torch.Tensor, ...]:
    """``A, B`` of this rank's ``L`` experts, such that ``B A`` has the layout of *weight*."""
    a, b = (local_part(matrix.weight).to(weight.dtype) for matrix in (lora_a, lora_b))
    count = weight.shape[0]
    a = a.reshape(count, -1, a.shape[1])  # [L, r, in]
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # [L, out, r]
    return (a, b) if swapped else (b.transpose(1, 2), a.transpose(1, 2))


@torch.no_grad()
def _product(
    lora_a: nn.ModuleDict, lora_b: nn.ModuleDict, scaling: dict[str, float], like: Any, swapped: bool, name: str
) -> DTensor:
    """Peft's ``get_delta_weight``, by which it merges: the product, laid out as the experts' weight is."""
    a, b = _factors(lora_a[name], lora_b[name], like.empty, swapped)
    return DTensor.from_local(scaling[name] * (b @ a), like.mesh, like.placements, run_check=False)


@dataclass(frozen=True)
class _Layout:
    """How the weight of experts is spread."""

    mesh: Any
    placements: tuple[Any, ...]
    empty: torch.Tensor
    """``[L, 0]`` in its dtype."""


def _is_wrapper(module: nn.Module) -> bool:
    # Who has not imported peft has no adapters.
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, layer.ParamWrapper)


def _is_spread(experts: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in experts.parameters())
