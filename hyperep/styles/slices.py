# SPDX-License-Identifier: Apache-2.0
"""``TensorSlices``: the part of tensor parallelism that two styles share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.distribute import own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard
from hyperep.platform.capabilities import Capability
from hyperep.platform.protocol import Module
from hyperep.sharding import whole_shape
from hyperep.styles.checks import require_support

__all__ = ["TensorSlices"]


@dataclass(frozen=True)
class TensorSlices:
    """Which dim of which expert weight tensor parallelism splits, and what becomes of the partial sums.

    A weight is ``[E, out, in]``, or ``[E, in, out]`` if *transposed*; a bias is ``[E, out]``. That of a column-parallel
    weight is split with its features; that of a row-parallel one stays whole on each rank, and one rank alone adds it.

    A column-parallel weight may hold several weights of ``H`` features each, as ``gate_up`` ``[E, 2 H, D]`` does. Where
    they lie one after the other (packed) a rank takes its part of each; where their rows take turns (interleaved) its
    part is one run. Which of them it is cannot be seen, so it must be said; that it is one of them can be seen. Its
    bias is said to be so too.

    A parameter is named as its own module has it, or by its path below the experts.
    """

    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    output_layout: Placement | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    """How many weights lie one after the other, by name."""
    interleaved: Mapping[str, int] = field(default_factory=dict)
    """How many weights take turns, by name."""
    transposed: bool = False
    """Whether weights have the input features before the output's."""

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

    def placements(self, module: Module, mesh: DeviceMesh, ranks: int, path: str = "") -> dict[str, Placement]:
        """How each parameter of *module* itself, which stands at *path*, lies over ``tp``.

        Raises:
            ValueError: a parameter is not named, or neither a weight nor a bias; or it cannot be split by the ranks.
        """
        found: dict[str, Placement] = {}
        for key, parameter in own_parameters(mesh.platform, module).items():
            name, shape = self._name(key, path), whole_shape(mesh.platform, parameter)
            if name not in self.colwise + self.rowwise:
                raise ValueError(
                    f"parameter {name!r} is neither in colwise={self.colwise} nor in rowwise={self.rowwise}; "
                    "name it in one of them"
                )
            if len(shape) not in (2, 3):
                raise ValueError(
                    f"parameter {name!r} of shape {shape} cannot be split by the tp dimension {ranks}; "
                    f"{self._layout}, and biases [experts, out]"
                )
            dim = self._dim(name, shape)
            if dim is None:
                found[key] = Replicate()
                continue
            if shape[dim] % ranks:
                raise ValueError(
                    f"parameter {name!r} of shape {shape} cannot be split in dim {dim} by the tp dimension {ranks}; "
                    f"{self._layout}, and the split dim must be a multiple of {ranks}"
                )
            if name in self.colwise and shape[dim] % (ranks * self._fused(name)):
                raise ValueError(
                    f"parameter {name!r} of shape {shape} cannot be split in dim {dim} by the tp dimension {ranks}: "
                    f"it holds {self._fused(name)} weights, and the features of each must be a multiple of {ranks}"
                )
            found[key] = Shard(dim, parts=self.packed.get(name, 1))
        return found

    def sizes(self, module: Module, mesh: DeviceMesh, ranks: int) -> frozenset[int]:
        """Sizes of the dims that are split, in *module* and below it. All is checked here, before anything is changed.

        Raises:
            ValueError: as :meth:`placements`; or the weights that give the hidden features and those that take them do
                not agree on their number.
        """
        found: set[int] = set()
        given: dict[str, tuple[int, tuple[int, ...]]] = {}
        taken: dict[str, tuple[int, tuple[int, ...]]] = {}
        for path, part in mesh.platform.named_modules(module).items():
            parameters = own_parameters(mesh.platform, part)
            for key, placement in self.placements(part, mesh, ranks, path).items():
                name, shape = self._name(key, path), whole_shape(mesh.platform, parameters[key])
                if isinstance(placement, Shard):
                    size = shape[placement.dim]
                    found |= {size, size // self._fused(name)}
                    (given if name in self.colwise else taken)[name] = size, shape
        self._require_features(given, {size for size, _ in taken.values()})
        return frozenset(found)

    def added_once(self, module: Module, mesh: DeviceMesh) -> tuple[str, ...]:
        """Paths of the biases of row-parallel weights in *module*.

        Raises:
            UnsupportedCapability: there are some, and modules cannot be called with others in their place.
        """
        parameters = mesh.platform.parameters(module)
        biases = tuple(
            path
            for path, parameter in parameters.items()
            if self._name(*reversed(path.rpartition(".")[::2])) in self.rowwise
            and len(whole_shape(mesh.platform, parameter)) == 2
        )
        if biases:
            hint = f"the biases {list(biases)} are added by one rank of tp, and are zeros on the others"
            require_support(mesh.platform, Capability.FUNCTIONAL_CALL, hint)
        return biases

    def adding_once(
        self, call: Callable[..., Any], module: Module, mesh: DeviceMesh, biases: Sequence[str]
    ) -> Callable[..., Any]:
        """*call*, which calls *module*, in which the *biases* are zeros on all ranks of ``tp`` but the first.

        Their gradients are whole on every rank: they are sums of the same cotangents.
        """
        if not biases or mesh.get_local_rank("tp") == 0:
            return call
        platform = mesh.platform

        def called(*inputs: Any, **kwargs: Any) -> Any:
            parameters = platform.parameters(module)
            zeros = {}
            for path in biases:
                bias = platform.local(parameters[path])
                zeros[path] = bias - platform.stop_gradient(bias)  # zeros, with the bias's gradient
            return platform.functional_call(module, zeros, call, *inputs, **kwargs)

        return called

    def _name(self, key: str, path: str) -> str:
        """What the parameter *key* of the module at *path* is called here."""
        whole = f"{path}.{key}" if path else key
        return whole if whole in self.colwise + self.rowwise else key

    def _dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dim that is split, if one is."""
        if len(shape) == 2:
            return 1 if name in self.colwise else None
        return 1 if (name in self.colwise) != self.transposed else 2

    @property
    def _layout(self) -> str:
        return f"weights are {'[experts, in, out]' if self.transposed else '[experts, out, in]'}"

    def _fused(self, name: str) -> int:
        """How many weights the parameter *name* holds."""
        return self.packed.get(name) or self.interleaved.get(name) or 1

    def _require_features(self, colwise: Mapping[str, tuple[int, tuple[int, ...]]], taken: set[int]) -> None:
        for name, (given, shape) in colwise.items():
            fused = self._fused(name)
            if not taken or given in {fused * features for features in taken}:
                continue
            takes = " or ".join(map(str, sorted(taken)))
            several = sorted(given // features for features in taken if given % features == 0 and given > features)
            turned = "" if self.transposed else "; if weights are [experts, in, out], say transposed=True"
            if fused > 1:
                raise ValueError(
                    f"parameter {name!r} of shape {shape} is said to hold {fused} weights, of {given / fused:g} "
                    f"features each, but the rowwise weights {self.rowwise} take {takes}; correct the number{turned}"
                )
            hint = (
                f"if it holds {several[0]} weights, say packed={{{name!r}: {several[0]}}} where they lie one after the "
                f"other, or interleaved={{{name!r}: {several[0]}}} where their rows take turns"
                if several
                else "the features that colwise weights give are those that rowwise weights take"
            )
            raise ValueError(
                f"parameter {name!r} of shape {shape} gives {given} features, but the rowwise weights "
                f"{self.rowwise} take {takes}; {hint}{turned}"
            )

    @property
    def reduced(self) -> bool:
        """Whether partial sums are added up here, rather than by the caller."""
        return self.output_layout != Partial()

    def reduce(self, platform: Any, partial: Any, group: Any) -> Any:
        """Sum the slices' terms over *group*, unless the caller asked to do it."""
        return platform.reduce_from_group(partial, group) if self.reduced else partial
