# SPDX-License-Identifier: Apache-2.0
"""Models from the hub's files, of which each rank reads its own experts alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from hyperep.platform.selection import adopt_mesh
from hyperep_torch.full_state import saved_otherwise
from hyperep_torch.transformers.parallelize import expert_parallelize

__all__ = ["from_pretrained"]

_SPREAD = ("gradients", "exchange", "levels", "experts_implementation")
"""Options of :func:`expert_parallelize`."""


def from_pretrained(model_class: Any, directory: str | os.PathLike[str], mesh: Any, **kwargs: Any) -> nn.Module:
    """Transformers' ``from_pretrained``, with experts that are spread before they are read.

    The model is made without memory, its experts are spread as :func:`expert_parallelize` does, and transformers then
    reads for every parameter what this rank has of it: experts of other ranks never leave the files, whether these hold
    them one by one or stacked.

    Args:
        model_class: a class of transformers, also an automatic one such as ``AutoModelForCausalLM``.
        directory: with the hub's safetensors, or a name on the hub.
        mesh: as :func:`expert_parallelize` takes it.
        kwargs: the options of :func:`expert_parallelize`, and what else transformers' ``from_pretrained`` takes.

    Returns:
        The model, in evaluation mode as transformers returns it.

    Raises:
        ValueError: as :func:`expert_parallelize`, and on all ranks for experts whose weights hyperep keeps in another
            shape than the files: those are loaded whole, and spread then.
    """
    options = {name: kwargs.pop(name) for name in _SPREAD if name in kwargs}
    device = torch.device(adopt_mesh(mesh).platform.device)
    stock = _concrete(model_class, directory, kwargs)

    def init(self: Any, *args: Any, **init_kwargs: Any) -> None:
        stock.__init__(self, *args, **init_kwargs)
        with torch.device(device):  # that of the collectives; the weights stay where transformers makes them
            expert_parallelize(self, mesh, **options)
        if reshaped := sorted(saved_otherwise(self)):
            raise ValueError(
                f"{stock.__name__} keeps {reshaped[0]!r} in another shape than its files, once its experts are spread; "
                "load the model whole, and call expert_parallelize then"
            )

    # Made by transformers' own way, whose models do not know that another one is among them.
    spread = type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})
    model = spread.from_pretrained(directory, **kwargs)
    model.__class__ = stock
    return model


def _concrete(model_class: Any, directory: str | os.PathLike[str], kwargs: dict[str, Any]) -> type[nn.Module]:
    """The class of the model that an automatic class would make."""
    if issubclass(model_class, nn.Module):
        return model_class
    config = kwargs.get("config")
    if config is None:
        config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return type(model_class.from_config(config))
