# SPDX-License-Identifier: Apache-2.0
"""``ModuleSubject``: an ``nn.Module`` as a subject of the audit, in a few lines of its author's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from hyperep.audit.claims import Claims
from hyperep.audit.shown import Shown
from hyperep.audit.subject import Specimen
from hyperep_torch.audit.script import script_of
from hyperep_torch.audit.specimen import ModuleSpecimen
from hyperep_torch.world import ensure_process_group

__all__ = ["ModuleSubject"]

Arrays = Mapping[str, np.ndarray]


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The default optimizer: its ``eps`` is large, so that tiny gradients do not decide the direction of a step."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # One tensor after the other: lists that mix DTensors and tensors are refused by the fused forms.
    return torch.optim.AdamW(trainable, lr=0.02, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, foreach=False)


def call(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The default way to call a layer."""
    return module(tokens)


def same(arrays: Arrays) -> Arrays:
    """The default layout: that of the claims."""
    return arrays


@dataclass(frozen=True, kw_only=True)
class ModuleSubject:
    """A layer of PyTorch. Only ``make`` and ``names`` are needed for a plain one.

    All functions lie in a module (not in ``__main__``), because each rank imports them. PyTorch's default process group
    is there when they are called.
    """

    make: Callable[[Claims], nn.Module]
    """``make(claims)``: the layer on this rank, sharded as it will be trained, with any weights."""
    names: Mapping[str, str]
    """Each weight of :attr:`Claims.shapes` -> the parameter's name. Parameters may be DTensors of any placements; plain
    ones are whole, or this rank's equal share of dim 0. ``{}`` stands for the number of a local expert where each
    expert is a module of its own: ``"experts.{}.w1"``."""
    claims: Claims = field(default_factory=Claims)
    name: str = ""
    """In reports; empty for that of the subject in its module."""
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = call
    """``call(module, tokens [T, D]) -> [T, D]``."""
    reduce: Callable[[nn.Module], None] | None = None
    """What you do between backward and the optimizer, such as summing gradients of replicated parameters."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = adamw
    """AdamW, Adam or SGD, with one set of hyperparameters; ``None`` if optimizers are not to be examined."""
    norm: Callable[[nn.Module], Any] | None = None
    """The norm of all gradients as you compute it, ``lambda m: clip_grad_norm_(m.parameters(), 1e9)`` for instance."""
    save: Callable[[nn.Module, torch.optim.Optimizer, str], None] | None = None
    """``save(module, optimizer, folder)``: write a checkpoint. Called on every rank."""
    load: Callable[[nn.Module, torch.optim.Optimizer, str], None] | None = None
    """``load(module, optimizer, folder)``: read it again."""
    to_layer: Callable[[Arrays], Arrays] = same
    """From whole weights, by the claims' names, to the layer's layout: transposed, fused. Names of the result are
    looked up in :attr:`names`, or are the parameters' own."""
    from_layer: Callable[[Arrays], Arrays] = same
    """The way back, for gradients too."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong into the report."""
    platform: str = "torch"

    @property
    def versions(self) -> dict[str, str]:
        """Versions for the report."""
        return {"torch": torch.__version__} | {name: metadata.version(name) for name in self.packages}

    def build(self, platform: Any, weights: Arrays | None, seed: int) -> Specimen:  # noqa: D102
        ensure_process_group(platform._world)
        torch.manual_seed(seed)
        return ModuleSpecimen(self, platform.torch_device, weights)

    def canonical(self, arrays: Arrays) -> Arrays:  # noqa: D102
        return self.from_layer(arrays)

    def script(self, shown: Shown) -> str:  # noqa: D102
        return script_of(self, shown)
