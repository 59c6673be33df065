# SPDX-License-Identifier: Apache-2.0
"""``TensorSlices``: the part of tensor parallelism that two styles share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyperep.distribute import own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard
from hyperep.platform.protocol import Module
from hyperep.sharding import whole_shape

__all__ = ["TensorSlices"]


@dataclass(frozen=True)
class TensorSlices:
    """Which dim of which expert weight tensor parallelism splits, and what becomes of the partial sums.

    A column-parallel weight may hold several weights of ``H`` features each, as ``gate_up`` ``[E, 2 H, D]`` does. Where
    they lie one after the other (packed) a rank takes its part of each; where their rows take turns (interleaved) its
    part is one run. Which of them it is cannot be seen, so it must be said; that it is one of them can be seen.
    """

    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    output_layout: Placement | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    """How many weights lie one after the other, by name."""
    interleaved: Mapping[str, int] = field(default_factory=dict)
    """How many weights take turns, by name."""

    def __post_init__(self) -> None:
        if self.output_layout not in (None, Replicate(), Partial()):
            raise ValueError(f"output_layout={self.output_layout!r}: choose Replicate() or Partial()")
        both = sorted(set(self.colwise) & set(self.rowwise))
        if both:
            raise ValueError(f"{both} are both colwise and rowwise; choose one for each")
        object.__setattr__(self, "packed", dict(self.packed))
        object.__setattr__(self, "interleaved", dict(self.interleaved))
        for key in sorted({*self.packed, *self.interleaved}):
            if key not in self.colwise or (key in self.packed and key in self.interleaved):
                raise ValueError(
                    f"packed={self.packed}, interleaved={self.interleaved}: {key!r} must be one of "
                    f"colwise={self.colwise}, and in one of the two only"
                )
            if not isinstance(self._fused(key), int) or self._fused(key) < 1:
                raise ValueError(f"{key!r} holds {self._fused(key)!r} weights; give a whole number, 1 or more")

    def shards(self, module: Module, mesh: DeviceMesh, ranks: int) -> dict[str, Shard]:
        """How each parameter of *module* itself lies over ``tp``; checked before anything is changed.

        Raises:
            ValueError: a parameter is not named, or not ``[experts, out, in]``; it cannot be split by the ranks; or the
                weights that give the hidden features and those that take them do not agree on their number.
        """
        dims: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for key, parameter in own_parameters(mesh.platform, module).items():
            if key not in self.colwise + self.rowwise:
                raise ValueError(
                    f"parameter {key!r} is neither in colwise={self.colwise} nor in rowwise={self.rowwise}; "
                    "name it in one of them"
                )
            dims[key] = 1 if key in self.colwise else 2
            shape = shapes[key] = whole_shape(mesh.platform, parameter)
            if len(shape) != 3 or shape[dims[key]] % ranks:
                raise ValueError(
                    f"parameter {key!r} of shape {shape} cannot be split in dim {dims[key]} by the tp dimension "
                    f"{ranks}; weights are [experts, out, in], and the split dim must be a multiple of {ranks}"
                )
        self._require_features(shapes)
        for key in shapes:
            if key in self.colwise and shapes[key][1] % (ranks * self._fused(key)):
                raise ValueError(
                    f"parameter {key!r} of shape {shapes[key]} cannot be split in dim 1 by the tp dimension {ranks}: "
                    f"it holds {self._fused(key)} weights, and the features of each must be a multiple of {ranks}"
                )
        return {key: Shard(dim, parts=self.packed.get(key, 1)) for key, dim in dims.items()}

    def sizes(self, module: Module, mesh: DeviceMesh, ranks: int) -> frozenset[int]:
        """Sizes of the dims that are split, in *module* and below it; raises what :meth:`shards` does."""
        found = set()
        for part in mesh.platform.named_modules(module).values():
            parameters = own_parameters(mesh.platform, part)
            for key, shard in self.shards(part, mesh, ranks).items():
                size = whole_shape(mesh.platform, parameters[key])[shard.dim]
                found |= {size, size // self._fused(key)}
        return frozenset(found)

    def _fused(self, key: str) -> int:
        """How many weights the parameter *key* holds."""
        return self.packed.get(key) or self.interleaved.get(key) or 1

    def _require_features(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        taken = {shapes[key][2] for key in self.rowwise if key in shapes}
        for key in self.colwise:
            if not taken or key not in shapes:
                continue
            given, fused = shapes[key][1], self._fused(key)
            if given in {fused * features for features in taken}:
                continue
            takes = " or ".join(map(str, sorted(taken)))
            several = sorted(given // features for features in taken if given % features == 0 and given > features)
            if fused > 1:
                raise ValueError(
                    f"parameter {key!r} of shape {shapes[key]} is said to hold {fused} weights, of {given / fused:g} "
                    f"features each, but the rowwise weights {self.rowwise} take {takes}; correct the number"
                )
            hint = (
                f"if it holds {several[0]} weights, say packed={{{key!r}: {several[0]}}} where they lie one after the "
                f"other, or interleaved={{{key!r}: {several[0]}}} where their rows take turns"
                if several
                else "the features that colwise weights give are those that rowwise weights take"
            )
            raise ValueError(
                f"parameter {key!r} of shape {shapes[key]} gives {given} features, but the rowwise weights "
                f"{self.rowwise} take {takes}; {hint}"
            )

    @property
    def reduced(self) -> bool:
        """Whether partial sums are added up here, rather than by the caller."""
        return self.output_layout != Partial()

    def reduce(self, platform: Any, partial: Any, group: Any) -> Any:
        """Sum the slices' terms over *group*, unless the caller asked to do it."""
        return platform.reduce_from_group(partial, group) if self.reduced else partial
