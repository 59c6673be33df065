# SPDX-License-Identifier: Apache-2.0
"""Whole weights of a model whose experts are spread over ranks, in the form in which the hub has them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.transformers.forms import SAVED_AS

__all__ = ["full_state_dict", "save_pretrained"]


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, on the host of rank 0; empty on all others.

    Collective over all ranks. Tensors are gathered one at a time, so that a device holds one whole tensor at most.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    whole: dict[str, Any] = {}
    saved_as = {
        f"{path}.{name}": shaped
        for path, module in model.named_modules()
        for name, shaped in getattr(module, SAVED_AS, {}).items()
    }
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if name in saved_as:
            value = saved_as[name](value)
        if first:
            whole[name] = value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
    return whole


def save_pretrained(model: Any, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Transformers' ``model.save_pretrained`` for a model whose experts are spread: rank 0 writes whole weights.

    Collective over all ranks, and over when the files are written. Stock ``from_pretrained`` reads them.

    Args:
        model: a model of transformers, not wrapped in ``DistributedDataParallel``.
        directory: where to, the same on all ranks.
        kwargs: what else transformers' method takes.
    """
    state = full_state_dict(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=state, **kwargs)
    if dist.is_initialized():
        dist.barrier()
