# SPDX-License-Identifier: Apache-2.0
"""Which part of a whole weight a parameter is: of a DTensor as its placements say, of a plain one by its shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hyperep.audit.subject import Part, part_of_rank

__all__ = ["Held", "held_parts"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """A parameter, and where it lies in the whole."""

    parameter: nn.Parameter
    start: tuple[int, ...]
    shape: tuple[int, ...]
    """Of this rank's part, as a part of the whole; an expert that is a module of its own has one dim more here."""
    whole: tuple[int, ...]

    def assign(self, whole: np.ndarray) -> None:
        """Give it its part of the whole."""
        where = tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        local = _local(self.parameter)
        with torch.no_grad():
            local.copy_(torch.tensor(whole[where], dtype=torch.float64).reshape(local.shape))

    def weight(self) -> Part:
        """What it holds."""
        return self._part(_local(self.parameter))

    def gradient(self) -> Part:
        """Its gradient. One that is still a sum to be taken over ranks is summed."""
        gradient = self.parameter.grad
        if isinstance(gradient, DTensor):
            assert isinstance(self.parameter, DTensor)
            if any(isinstance(placement, Partial) for placement in gradient.placements):
                gradient = gradient.redistribute(placements=self.parameter.placements)
            gradient = gradient.to_local()
        return self._part(gradient)

    def _part(self, local: torch.Tensor | None) -> Part:
        value = None if local is None else local.detach().to("cpu", torch.float64).numpy().copy().reshape(self.shape)
        return Part(value=value, start=self.start, whole=self.whole, shape=self.shape)


def held_parts(module: nn.Module, name: str, whole: tuple[int, ...], rank: int) -> tuple[Held, ...]:
    """The parameters of the module that make up this rank's part of a weight.

    Raises:
        ValueError: there is none of that name, or its shape fits no part that is known.
    """
    parameters = dict(module.named_parameters())
    if "{}" not in name:
        return (_held(parameters, name, whole, rank),)
    names = [name.format(i) for i in range(whole[0])]
    local = [n for n in names if n in parameters]
    if not local or whole[0] % len(local):
        raise ValueError(f"{len(local)} parameters are named like {name!r}, no equal share of {whole[0]} experts")
    first = rank % (whole[0] // len(local)) * len(local)
    zeros = (0,) * (len(whole) - 1)
    return tuple(
        Held(parameter=parameters[n], start=(first + i, *zeros), shape=(1, *whole[1:]), whole=whole)
        for i, n in enumerate(local)
    )


def _held(parameters: dict[str, nn.Parameter], name: str, whole: tuple[int, ...], rank: int) -> Held:
    if name not in parameters:
        raise ValueError(f"the layer has no parameter {name!r}; it has {sorted(parameters)}: see names=")
    parameter = parameters[name]
    if isinstance(parameter, DTensor):
        if tuple(parameter.shape) != whole:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, and not {whole} as claimed; see to_layer=")
        shape, start = compute_local_shape_and_global_offset(whole, parameter.device_mesh, parameter.placements)
        return Held(parameter=parameter, start=tuple(start), shape=tuple(shape), whole=whole)
    try:
        part = part_of_rank(None, tuple(parameter.shape), whole, rank)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; see to_layer=") from None
    return Held(parameter=parameter, start=part.start, shape=part.shape, whole=whole)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
