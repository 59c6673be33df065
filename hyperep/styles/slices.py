# SPDX-License-Identifier: Apache-2.0
"""``TensorSlices``: the part of tensor parallelism that two styles share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.distribute import own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate
from hyperep.platform.protocol import Module

__all__ = ["TensorSlices"]


@dataclass(frozen=True)
class TensorSlices:
    """Which dim of which expert weight tensor parallelism splits, and what becomes of the partial sums."""

    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    output_layout: Placement | None = None

    def __post_init__(self) -> None:
        if self.output_layout not in (None, Replicate(), Partial()):
            raise ValueError(f"output_layout={self.output_layout!r}: choose Replicate() or Partial()")
        both = sorted(set(self.colwise) & set(self.rowwise))
        if both:
            raise ValueError(f"{both} are both colwise and rowwise; choose one for each")

    def dims(self, module: Module, mesh: DeviceMesh, ranks: int) -> dict[str, int]:
        """The tensor dim to split, for each parameter of *module* itself; checked before anything is changed."""
        dims: dict[str, int] = {}
        for key, parameter in own_parameters(mesh.platform, module).items():
            if key not in self.colwise + self.rowwise:
                raise ValueError(
                    f"parameter {key!r} is neither in colwise={self.colwise} nor in rowwise={self.rowwise}; "
                    "name it in one of them"
                )
            dims[key] = 1 if key in self.colwise else 2
            shape = tuple(parameter.shape)
            if len(shape) != 3 or shape[dims[key]] % ranks:
                raise ValueError(
                    f"parameter {key!r} of shape {shape} cannot be split in dim {dims[key]} by the tp dimension "
                    f"{ranks}; weights are [experts, out, in], and the split dim must be a multiple of {ranks}"
                )
        return dims

    @property
    def reduced(self) -> bool:
        """Whether partial sums are added up here, rather than by the caller."""
        return self.output_layout != Partial()

    def reduce(self, platform: Any, partial: Any, group: Any) -> Any:
        """Sum the slices' terms over *group*, unless the caller asked to do it."""
        return platform.reduce_from_group(partial, group) if self.reduced else partial
