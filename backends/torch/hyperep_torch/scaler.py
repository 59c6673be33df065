# SPDX-License-Identifier: Apache-2.0
"""``GradScaler``: PyTorch's, for gradients that are DTensors of several meshes, and plain tensors."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from hyperep_torch.gradient_parts import gradient_parts

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``; what is not finite on one rank skips the step on every rank.

    Args:
        device: kind of device that the gradients are on.
        group: ranks that step together beyond those of the parameters' meshes, the stages of a pipeline for instance.
        options: those of PyTorch's class.
    """

    def __init__(self, device: str = "cuda", *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self._group = group

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        parts = gradient_parts([p for group in optimizer.param_groups for p in group["params"]])
        lists: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for found in parts:
            for gradient in found.gradients:
                if gradient.dtype == torch.float16 and not allow_fp16:
                    raise ValueError("GradScaler: a gradient is float16; keep parameters in float32 and use autocast")
                lists[gradient.device, gradient.dtype].append(gradient)
        total = found_inf.clone()
        for (device, _), gradients in lists.items():
            here = torch.zeros_like(found_inf, device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, here, inv_scale.to(device))
            total = torch.maximum(total, here.to(total.device))
        for found in parts:
            on_mesh = total.to(found.device)
            for group in found.everywhere:
                dist.all_reduce(on_mesh, dist.ReduceOp.MAX, group=group)
            total = on_mesh.to(total.device)
        if self._group is not None:
            dist.all_reduce(total, dist.ReduceOp.MAX, group=self._group)
        return {total.device: total}
