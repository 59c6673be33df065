# SPDX-License-Identifier: Apache-2.0
"""This rank's parts of DTensors, through which gradients flow.

``DTensor.to_local`` does this for one tensor at a time, and its backward derives and checks the layout of the gradient
anew: for the three weights of a layer of experts, a third of all that parallelism costs in Python
(``benchmarks/overhead.py``). :func:`local_parts` opens several at once, and gives a gradient the layout that its
parameter has. ``_OpenAll`` and ``_as_gradient`` are the only users of what DTensors have beyond their public API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["local_part", "local_parts"]

_SIMPLE = (Shard, Replicate)


def local_part(value: Any) -> Any:
    """This rank's part of a DTensor, through which gradients flow; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def local_parts(tensors: Sequence[DTensor]) -> tuple[torch.Tensor, ...]:
    """What :func:`local_part` is for each of *tensors*; their gradients become DTensors in one step of backward.

    For a tensor that needs no gradient none is computed. One that needs it and is not used has the gradient ``None``,
    as ever; but hooks that somebody registered on it are called with that.
    """
    # One node of autograd marks all of its outputs as differentiable; so it is for those that are.
    together = [x for x in tensors if x.requires_grad and _is_simple(x)]
    # The compiler knows to_local, and what becomes of it.
    if not together or torch.compiler.is_compiling():
        return tuple(tensor.to_local() for tensor in tensors)
    opened = {id(x): part for x, part in zip(together, _OpenAll.apply(*together), strict=True)}
    return tuple(opened[id(x)] if id(x) in opened else x.to_local() for x in tensors)


def _is_simple(tensor: DTensor) -> bool:
    """Whether the gradient has the layout of the tensor; that of a pending sum has another."""
    return all(isinstance(placement, _SIMPLE) for placement in tensor.placements)


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
    """The DTensor of which this rank's part is *gradient*, with the shape and strides that the parameter has."""
    if gradient.stride() != stride:
        gradient = gradient.new_empty_strided(gradient.shape, stride).copy_(gradient)
    if torch.is_grad_enabled() or gradient.dtype != spec.tensor_meta.dtype:
        # Somebody differentiates the gradient itself; or the layout has another dtype, as in FSDP2's mixed precision.
        whole = {"shape": spec.tensor_meta.shape, "stride": spec.tensor_meta.stride}
        return DTensor.from_local(gradient, spec.mesh, spec.placements, run_check=False, **whole)
    return DTensor(gradient, _copied(spec), requires_grad=False)


def _copied(spec: Any) -> Any:
    """Another layout, because PyTorch's operators write into those of their results; one that knows its hash too."""
    hash(spec)
    layout = object.__new__(type(spec))
    layout.__dict__.update(spec.__dict__)
    return layout
