# SPDX-License-Identifier: Apache-2.0
"""``ModuleSpecimen``: an ``nn.Module`` on one rank, as the audit handles it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperep.audit.subject import Call, Mode, NotOffered, Part, Specimen
from hyperep_torch.audit.parts import Held, held_parts

if TYPE_CHECKING:
    from hyperep_torch.audit.module_subject import ModuleSubject

__all__ = ["ModuleSpecimen"]


class ModuleSpecimen(Specimen):
    """See :class:`Specimen`.

    Args:
        subject: whose layer to make.
        device: of its tokens.
        weights: whole, by the claims' names; ``None`` leaves the layer's own.

    Raises:
        ValueError: the module lacks a parameter, or holds a part that cannot be placed.
    """

    def __init__(self, subject: ModuleSubject, device: torch.device, weights: Mapping[str, np.ndarray] | None) -> None:
        self._subject, self._device = subject, device
        self._dtype = getattr(torch, subject.claims.precision)
        self._module: nn.Module = subject.make(subject.claims)
        whole = subject.to_layer({name: np.zeros(shape) for name, shape in subject.claims.shapes.items()})
        rank = dist.get_rank()
        self._held: dict[str, tuple[Held, ...]] = {
            name: held_parts(self._module, subject.names.get(name, name), array.shape, rank)
            for name, array in whole.items()
        }
        if weights is not None:
            for name, array in subject.to_layer(dict(weights)).items():
                for held in self._held[name]:
                    held.assign(array)
        self._optimizer: torch.optim.Optimizer | None = None

    def forward(self, tokens: np.ndarray, mode: Mode) -> Call:  # noqa: D102
        x = torch.tensor(tokens, dtype=self._dtype, device=self._device, requires_grad=mode != "evaluate")
        if mode == "evaluate":
            self._module.eval()
            with torch.no_grad():
                out = self._subject.call(self._module, x)
            self._module.train()
        elif mode == "recompute":
            out = checkpoint(self._subject.call, self._module, x, use_reentrant=False)
        else:
            out = self._subject.call(self._module, x)
        return Call(output=_host(out), tokens_after=_host(x), handle=(x, out))

    def backward(self, handle: Any, cotangent: np.ndarray) -> np.ndarray | None:  # noqa: D102
        x, out = handle
        if not out.requires_grad and not len(x):
            return None  # harmless, unless others wait for what this rank would do in backward
        if not out.requires_grad:
            raise RuntimeError("the output of the layer has no gradient history, so backward cannot begin")
        out.backward(torch.tensor(cotangent, dtype=out.dtype, device=out.device))
        return None if x.grad is None else _host(x.grad)

    def finish(self) -> None:  # noqa: D102
        if self._subject.reduce is not None:
            self._subject.reduce(self._module)

    def gradients(self) -> Mapping[str, tuple[Part, ...]]:  # noqa: D102
        return {name: tuple(held.gradient() for held in parts) for name, parts in self._held.items()}

    def zero(self) -> None:  # noqa: D102
        for parameter in self._module.parameters():
            parameter.grad = None

    def weights(self) -> Mapping[str, tuple[Part, ...]]:  # noqa: D102
        return {name: tuple(held.weight() for held in parts) for name, parts in self._held.items()}

    def gradient_norm(self) -> float:  # noqa: D102
        if self._subject.norm is None:
            raise NotOffered("the subject has no norm=")
        norm = self._subject.norm(self._module)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def optimizer(self) -> Mapping[str, Any]:  # noqa: D102
        optimizer = self._its_optimizer()
        name = {"AdamW": "adamw", "SGD": "sgd"}.get(type(optimizer).__name__)
        if name is None or len(optimizer.param_groups) != 1:
            raise NotOffered(f"{type(optimizer).__name__} with {len(optimizer.param_groups)} groups is not modelled")
        group = optimizer.param_groups[0]
        known = ("lr", "betas", "eps", "weight_decay", "momentum")
        return {"name": name} | {key: group[key] for key in known if key in group}

    def step(self) -> None:  # noqa: D102
        self._its_optimizer().step()

    def save(self, folder: str) -> None:  # noqa: D102
        if self._subject.save is None or self._subject.load is None:
            raise NotOffered("the subject has no save= and load=")
        self._subject.save(self._module, self._its_optimizer(), folder)

    def load(self, folder: str) -> None:  # noqa: D102
        if self._subject.load is None:
            raise NotOffered("the subject has no load=")
        self._subject.load(self._module, self._its_optimizer(), folder)

    def freeze(self, kind: str) -> None:  # noqa: D102
        claims = self._subject.claims
        marked = {name: np.full(shape, claims.kind(name) == kind) for name, shape in claims.shapes.items()}
        for name, mark in self._subject.to_layer(marked).items():  # a fused parameter is of the kind of its parts
            for held in self._held[name] if mark.all() else ():
                held.parameter.requires_grad_(False)

    def kept_bytes(self) -> int:  # noqa: D102
        gc.collect()
        storages = {}
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, nn.Parameter) and found.layout == torch.strided:
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _its_optimizer(self) -> torch.optim.Optimizer:
        if self._subject.optimizer is None:
            raise NotOffered("the subject has no optimizer=")
        if self._optimizer is None:
            self._optimizer = self._subject.optimizer(self._module)
        return self._optimizer


def _host(x: torch.Tensor) -> np.ndarray:
    value = x.detach()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.to("cpu", torch.float64).numpy().copy()
