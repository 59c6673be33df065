# SPDX-License-Identifier: Apache-2.0
"""This rank's parts of gradients, by the ranks that hold the other parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate

__all__ = ["GradientParts", "gradient_parts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientParts:
    """Gradients that lie over the same ranks."""

    groups: tuple[dist.ProcessGroup, ...]
    """Along which the other parts lie; sums over one group after the other are sums over all."""
    everywhere: tuple[dist.ProcessGroup, ...]
    """The same, and along which there are replicas."""
    device: torch.device
    """On which these groups communicate."""
    gradients: list[torch.Tensor] = field(default_factory=list)
    """Plain tensors that share the memory of the gradients."""


def gradient_parts(parameters: Sequence[torch.Tensor]) -> list[GradientParts]:
    """The gradients of *parameters*, in the same order of ranks everywhere, also where a rank has no gradient.

    A gradient that is a pending sum is summed first.
    """
    found: dict[Any, GradientParts] = {}
    for parameter in parameters:
        if not parameter.requires_grad and parameter.grad is None:
            continue
        if not isinstance(parameter, DTensor):
            parts = found.setdefault(None, GradientParts(groups=(), everywhere=(), device=parameter.device))
            if parameter.grad is not None:
                parts.gradients.append(parameter.grad)
            continue
        mesh = parameter.device_mesh
        sharded = tuple(d for d, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate))
        key = (mesh, sharded)
        if key not in found:
            groups = [mesh.get_group(d) for d in range(mesh.ndim)]
            found[key] = GradientParts(
                groups=tuple(groups[d] for d in sharded if mesh.size(d) > 1),
                everywhere=tuple(group for d, group in enumerate(groups) if mesh.size(d) > 1),
                device=_device_of(mesh, parameter),
            )
        if parameter.grad is not None:
            found[key].gradients.append(_settled(parameter).to_local())
    return list(found.values())


def _settled(parameter: DTensor) -> DTensor:
    """The gradient in the layout of its parameter."""
    gradient = parameter.grad
    assert isinstance(gradient, DTensor)
    if any(isinstance(placement, Partial) for placement in gradient.placements):
        gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    return gradient


def _device_of(mesh: Any, parameter: DTensor) -> torch.device:
    """Where the mesh communicates; gradients that are offloaded lie elsewhere."""
    local = parameter.to_local().device
    if local.type == mesh.device_type or mesh.device_type == "cpu":
        return torch.device(mesh.device_type) if mesh.device_type == "cpu" else local
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
