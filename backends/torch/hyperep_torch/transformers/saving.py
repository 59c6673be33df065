# SPDX-License-Identifier: Apache-2.0
"""Whole weights of a model whose experts are spread over ranks, in the form in which the hub has them."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from hyperep_torch.full_state import full_state_dict, gathered

__all__ = ["full_state_dict", "save_pretrained"]


def save_pretrained(model: Any, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Transformers' ``model.save_pretrained`` for a model whose experts are spread: rank 0 writes whole weights.

    Collective over all ranks, and over when the files are written. Stock ``from_pretrained`` reads them. Of a model of
    peft it is the adapters that are gathered and written, in peft's own format.

    Args:
        model: a model of transformers or of peft, not wrapped in ``DistributedDataParallel``.
        directory: where to, the same on all ranks.
        kwargs: what else transformers' method takes.
    """
    state = gathered(model, _saved_by_peft(model)) if hasattr(model, "peft_config") else full_state_dict(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=state, **kwargs)
    if dist.is_initialized():
        dist.barrier()


def _saved_by_peft(model: Any) -> dict[str, Any]:
    """The entries of the state dict, by their own names, that peft writes for any of its adapters."""
    from peft import get_peft_model_state_dict

    state = model.state_dict()
    kept: set[int] = set()
    for adapter in model.peft_config:
        kept |= {id(value) for value in get_peft_model_state_dict(model, state, adapter).values()}
    return {name: value for name, value in state.items() if id(value) in kept}
