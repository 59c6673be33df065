# SPDX-License-Identifier: Apache-2.0
"""``clip_grad_norm_``: clipping by the norm of all gradients, DTensors of any meshes and plain tensors together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from hyperep_torch.gradient_parts import GradientParts, gradient_parts

__all__ = ["clip_grad_norm_"]

_SMALLEST = 1e-6
"""Added to the norm, as PyTorch does: gradients may all be zero."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Clip all gradients by their common norm, in place; ``torch.nn.utils.clip_grad_norm_`` for any mixture.

    Each element of a DTensor counts once, on whichever rank it lies, and one that is replicated counts once too. A
    plain gradient is taken to be the same on all ranks. Collective over the meshes of all parameters: every rank of
    them gives the same parameters, whether it has their gradients or not.

    Args:
        parameters: whose gradients to clip.
        max_norm: the norm that they may have at most.
        norm_type: the ``p`` of the norm; ``inf`` for the largest element.
        error_if_nonfinite: raise where the norm is not finite, on every rank.
        foreach: scale lists of tensors, and not one tensor after the other; by default that is done.
        group: ranks that hold other parameters of the same model, the stages of a pipeline for instance; their norms
            count too.

    Returns:
        The norm before clipping, the same plain tensor on every rank.

    Raises:
        RuntimeError: the norm is not finite, if that was asked for.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    p = float(norm_type)
    parts = gradient_parts(given)
    total: Any = None
    for found in parts:
        term = _reduced(_power_sum(found, p), found, p)
        total = term if total is None else _joined(total, term.to(total.device), p)
    if total is None:
        total = torch.tensor(0.0)
    if group is not None:
        dist.all_reduce(total, _operation(p), group=group)
    norm = total if math.isinf(p) else total ** (1.0 / p)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {p} of the gradients of {len(given)} parameters is {norm.item()}, so they cannot be "
            "clipped; look for what made them so, or set error_if_nonfinite=False"
        )
    _scale(parts, (max_norm / (norm + _SMALLEST)).clamp(max=1.0), foreach is not False)
    wide = any(gradient.dtype == torch.float64 for found in parts for gradient in found.gradients)
    return norm if wide else norm.float()


def _power_sum(found: GradientParts, p: float) -> torch.Tensor:
    """The sum of the absolute elements to the power *p*, or the largest; of this rank's parts."""
    device = found.device
    # Squares of float32 overflow where the norm itself would not; not every accelerator has float64.
    wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    norms = [norm.to(device, wide) for norm in _norms(found.gradients, p)]
    if not norms:
        return torch.zeros((), dtype=wide, device=device)
    stacked = torch.stack(norms)
    return stacked.max() if math.isinf(p) else (stacked**p).sum()


def _norms(gradients: list[torch.Tensor], p: float) -> list[torch.Tensor]:
    filled = [gradient for gradient in gradients if gradient.numel()]  # the largest element of none is undefined
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for gradient in filled:
        groups[gradient.device, gradient.dtype].append(gradient)
    return [norm for group in groups.values() for norm in torch._foreach_norm(group, p)]


def _reduced(term: torch.Tensor, found: GradientParts, p: float) -> torch.Tensor:
    for group in found.groups:
        dist.all_reduce(term, _operation(p), group=group)
    return term


def _operation(p: float) -> Any:
    return dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM


def _joined(a: torch.Tensor, b: torch.Tensor, p: float) -> torch.Tensor:
    return torch.maximum(a, b) if math.isinf(p) else a + b


def _scale(parts: list[GradientParts], factor: torch.Tensor, foreach: bool) -> None:
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for found in parts:
        for gradient in found.gradients:
            groups[gradient.device, gradient.dtype].append(gradient)
    for (device, dtype), gradients in groups.items():
        here = factor.to(device, dtype)
        if foreach:
            torch._foreach_mul_(gradients, here)
        else:
            for gradient in gradients:
                gradient.mul_(here)
