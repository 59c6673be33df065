# SPDX-License-Identifier: Apache-2.0
"""How many choices each expert of each layer of a stock model got."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hyperep_torch.transformers.find import StockExperts, find_experts

__all__ = ["LayerLoad", "load_report"]


@dataclass(frozen=True)
class LayerLoad:
    """The load of one layer of experts, over all calls while the report was open."""

    path: str
    tokens_per_expert: torch.Tensor
    """int64 ``[E]``: choices of each expert, of all ranks that share the experts."""

    @property
    def imbalance(self) -> float:
        """The most loaded expert's choices, over the mean; 1 is even, and NaN means that nothing was routed."""
        counts = self.tokens_per_expert.double()
        return float(counts.max() / counts.mean())

    @property
    def idle_experts(self) -> int:
        """How many experts got nothing."""
        return int((self.tokens_per_expert == 0).sum())


@contextlib.contextmanager
def load_report(model: nn.Module) -> Iterator[list[LayerLoad]]:
    """Count what is routed while the context is open; the list is filled when it closes.

    Collective, if the experts are spread over ranks: all of these must open and close it.

    Example:
        >>> with load_report(model) as loads:  # doctest: +SKIP
        ...     model(**batch)
        >>> [(load.path, load.imbalance) for load in loads]  # doctest: +SKIP
    """
    counted: dict[str, torch.Tensor] = {}
    layers = find_experts(model)
    loads: list[LayerLoad] = []
    handles = [layer.module.register_forward_pre_hook(functools.partial(_count, counted, layer)) for layer in layers]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        parameter = next(layer.module.parameters())
        none = torch.zeros(layer.num_experts, dtype=torch.int64, device=parameter.device)
        counts = counted.get(layer.path, none)
        if isinstance(parameter, DTensor):
            counts = _summed(counts, parameter)
        loads.append(LayerLoad(layer.path, counts))


def _count(counted: dict[str, torch.Tensor], layer: StockExperts, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    counts = layer.form.choices(inputs[1], layer.num_experts)
    counted[layer.path] = counts + counted[layer.path] if layer.path in counted else counts


def _summed(counts: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    counts = counts.clone()
    for dimension in range(parameter.device_mesh.ndim):
        dist.all_reduce(counts, group=parameter.device_mesh.get_group(dimension))
    return counts
