# SPDX-License-Identifier: Apache-2.0
"""This rank's parts of DTensors, through which gradients flow.

``DTensor.to_local`` does this for one tensor at a time, and its backward derives and checks the layout of the gradient
anew: for the three weights of a layer of experts, a third of all that parallelism costs in Python
(``benchmarks/overhead.py``). :func:`local_parts` opens several at once, and gives a gradient the layout that its
parameter has. ``_OpenAll`` and ``_as_gradient`` are the only users of what DTensors have beyond their public API.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["local_part", "local_parts"]


def local_part(value: Any) -> Any:
    """This rank's part of a DTensor, through which gradients flow; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_parts(tensors: Sequence[DTensor]) -> tuple[torch.Tensor, ...]:
    """What :func:`local_part` is for each of *tensors*; their gradients become DTensors in one step of backward."""
    # The compiler knows to_local, and what becomes of it. A pending sum has a gradient of another layout than its own.
    simple = all(isinstance(p, Shard | Replicate) for tensor in tensors for p in tensor.placements)
    if len(tensors) == 0 or not simple or torch.compiler.is_compiling():
        return tuple(tensor.to_local() for tensor in tensors)
    return _OpenAll.apply(*tensors)


class _OpenAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # a part that was not used has no gradient, rather than zeros
        parts = [tensor._local_tensor for tensor in tensors]
        ctx.layouts = [(tensor._spec, part.stride()) for tensor, part in zip(tensors, parts, strict=True)]
        # Views, because autograd marks its outputs, and these tensors belong to the DTensors.
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(
            None if gradient is None else _as_gradient(gradient, *layout)
            for gradient, layout in zip(gradients, ctx.layouts, strict=True)
        )


def _as_gradient(gradient: torch.Tensor, spec: Any, stride: tuple[int, ...]) -> DTensor:
    known = gradient.stride() == stride and gradient.dtype == spec.tensor_meta.dtype
    if not known or torch.is_grad_enabled():
        # The layout of the whole has to be found out; or somebody differentiates the gradient itself.
        return DTensor.from_local(gradient, spec.mesh, spec.placements, run_check=False)
    # A copy, because PyTorch's operators write into the layouts of their results.
    return DTensor(gradient, copy.copy(spec), requires_grad=False)
