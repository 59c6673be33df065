# SPDX-License-Identifier: Apache-2.0
"""Parallel styles: partition the experts' parameters, then wrap their forward.

Every style is applied to a module of experts that is called as ``experts(rows, tokens_per_expert)``: rows sorted by
expert, and a count for each expert. :func:`hyperep.moe.GroupedExperts` makes one; a module of your own will do if the
first dim of each of its parameters is the expert.

Gradient scale, for all styles: the gradient of an expert is the **sum** over the rows that reached it, from all ranks
of the mesh. If the loss is a mean over the tokens of all ranks, divide each rank's loss by the global number of
tokens (sum the gradients of replicated parameters over the mesh, and leave those of experts alone). If instead each
rank's loss is a mean over its own tokens, and data parallelism averages the replicated gradients over ``R`` ranks,
then divide the experts' gradients by ``R`` too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from hyperep.dispatch import DispatchContext, combine, dispatch
from hyperep.distribute import distribute_parameter, own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh

__all__ = [
    "BaseExpertParallel",
    "ExpertParallel",
    "ExpertTensorParallel",
    "ParallelStyle",
    "TensorParallel",
]


class ParallelStyle(ABC):
    """A way to distribute a module over a mesh. Holds settings only; one object may serve many modules."""

    @abstractmethod
    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Distribute *module* over *mesh*, in place, and return it. Collective over the mesh."""


class BaseExpertParallel(ParallelStyle):
    """Expert parallelism with its three steps left open.

    A subclass says how parameters are partitioned, how rows get to the experts and how they come back. What dispatch
    has to tell combine goes through the context that the one returns and the other takes; never through ``self``.
    """

    mesh_dim_names: tuple[str, ...] = ("ep",)
    """The mesh that the style wants, by the names of its dimensions; the first one is split over experts."""

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Partition the experts, and route the rows of each call to their owners and back.

        Args:
            module: called as ``experts(rows, tokens_per_expert, **kwargs)``; returns one row for each row.
            mesh: a hyperep mesh or a native one with the style's dimensions.

        Raises:
            ValueError: the mesh has other dimensions; the number of experts is not divisible; the module has no
                parameters, or some without an expert dim, or some that are distributed already.
        """
        mesh = require_mesh(type(self).__name__, adopt_mesh(mesh), self.mesh_dim_names)
        num_experts = require_experts(type(self).__name__, module, mesh)
        ranks = mesh.shape[0]
        if num_experts % ranks:
            raise ValueError(
                f"num_experts={num_experts} is not divisible by the {self.mesh_dim_names[0]} dimension {ranks}; "
                f"choose a multiple of {ranks} experts, or an {self.mesh_dim_names[0]} size that divides {num_experts}"
            )
        for path, submodule in mesh.platform.named_modules(module).items():
            self._partition_fn(path, submodule, mesh)

        def routed(experts: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
            if len(inputs) != 2:
                raise TypeError(
                    f"{type(self).__name__} wraps a module called as experts(rows, tokens_per_expert), but it was called "
                    f"with {len(inputs)} positional inputs; apply the style to the experts, not to the layer around them"
                )
            local_inputs, context = self._token_dispatch(module, inputs, mesh, num_experts)
            return self._token_combine(module, experts(*local_inputs, **kwargs), mesh, context)

        mesh.platform.wrap_forward(module, routed)
        return module

    @abstractmethod
    def _partition_fn(self, name: str, module: Module, mesh: DeviceMesh) -> None:
        """Distribute the parameters that belong to *module* itself; *name* is its path below the experts."""

    @abstractmethod
    def _token_dispatch(
        self, module: Module, inputs: tuple[Any, ...], mesh: DeviceMesh, num_experts: int
    ) -> tuple[tuple[Any, ...], Any]:
        """Turn ``(rows, tokens_per_expert)`` into the inputs of this rank's experts, and a context."""

    @abstractmethod
    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: Any) -> Any:
        """Turn the output of this rank's experts into the rows of the caller, in the caller's order."""


class ExpertParallel(BaseExpertParallel):
    """Each rank owns ``E / R`` experts; rows travel to them by all-to-all.

    ============= ===========================================================================================
    mesh          1-D ``ep``
    weights       ``[E, ...]``: ``Shard(0)``
    input rows    this rank's own, sorted by expert
    output rows   this rank's own, same order
    backward      exact; the gradient of an expert sums the rows of all ranks
    ============= ===========================================================================================

    Example:
        >>> import hyperep
        >>> from hyperep.loopback import run
        >>> from hyperep.moe import GroupedExperts
        >>> def sharded(platform):
        ...     mesh = hyperep.init_device_mesh(platform, (2,), ("ep",))
        ...     experts = GroupedExperts(platform, dim=8, hidden_dim=16, num_experts=4)
        ...     return hyperep.ExpertParallel().apply(experts, mesh)
        >>> platform_of_rank_0_sees = run(sharded, world_size=2)[0].own_parameters["w1"]
        >>> platform_of_rank_0_sees.shape, platform_of_rank_0_sees.value.shape
        ((4, 16, 8), (2, 16, 8))
    """

    def _partition_fn(self, name: str, module: Module, mesh: DeviceMesh) -> None:
        for key in own_parameters(mesh.platform, module):
            distribute_parameter(module, key, mesh, [Shard(0)])

    def _token_dispatch(
        self, module: Module, inputs: tuple[Any, ...], mesh: DeviceMesh, num_experts: int
    ) -> tuple[tuple[Any, ...], DispatchContext]:
        rows, counts, context = dispatch(*inputs, mesh, num_experts=num_experts)
        return (rows, counts), context

    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: DispatchContext) -> Any:
        return combine(routed_output, context)


class TensorParallel(ParallelStyle):
    """Every rank holds a slice of every expert; rows are replicated and do not travel.

    ============= ===========================================================================================
    mesh          1-D ``tp``
    weights       ``w1``, ``w3`` ``[E, H, D]``: ``Shard(1)``; ``w2`` ``[E, D, H]``: ``Shard(2)``
    input rows    replicated over ``tp``
    output rows   replicated, after an all-reduce of the row-parallel product; or ``Partial`` on request
    backward      input gradient all-reduced over ``tp``, so that everything below the experts gets all of it
    ============= ===========================================================================================

    The pair of reductions is Megatron-LM's (arXiv:1909.08053).

    Args:
        colwise: names of the weights whose output features are split (tensor dim 1).
        rowwise: names of the weights whose input features are split (tensor dim 2).
        output_layout: ``Replicate()``, or ``Partial()`` for callers that reduce (or reduce-scatter) themselves.
    """

    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __init__(
        self,
        *,
        colwise: Sequence[str] = ("w1", "w3"),
        rowwise: Sequence[str] = ("w2",),
        output_layout: Placement | None = None,
    ) -> None:
        self.slices = TensorSlices(colwise, rowwise, output_layout)

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Slice the experts' weights and reduce where slices meet. Errors as for :class:`BaseExpertParallel`."""
        mesh = require_mesh(type(self).__name__, adopt_mesh(mesh), self.mesh_dim_names)
        require_experts(type(self).__name__, module, mesh)
        for key, dim in self.slices.dims(module, mesh, mesh.size()).items():
            distribute_parameter(module, key, mesh, [Shard(dim)])
        group, platform = mesh.get_group(), mesh.platform

        def sliced(experts: Callable[..., Any], rows: Any, *inputs: Any, **kwargs: Any) -> Any:
            partial = experts(platform.copy_to_group(rows, group), *inputs, **kwargs)
            return self.slices.reduce(platform, partial, group)

        platform.wrap_forward(module, sliced)
        return module


class ExpertTensorParallel(ExpertParallel):
    """Experts are split over ``ep``, and each of them is sliced over ``tp``.

    ============= ===========================================================================================
    mesh          2-D ``[ep, tp]``
    weights       ``w1``, ``w3``: ``[Shard(0), Shard(1)]``; ``w2``: ``[Shard(0), Shard(2)]``
    input rows    own per ``ep`` rank, replicated over ``tp``
    output rows   as the input; or ``Partial`` over ``tp`` on request
    backward      both that of :class:`ExpertParallel` and that of :class:`TensorParallel`
    ============= ===========================================================================================

    Rows travel within each ``ep`` group only. Arguments are those of :class:`TensorParallel`.
    """

    mesh_dim_names: tuple[str, ...] = ("ep", "tp")

    def __init__(
        self,
        *,
        colwise: Sequence[str] = ("w1", "w3"),
        rowwise: Sequence[str] = ("w2",),
        output_layout: Placement | None = None,
    ) -> None:
        self.slices = TensorSlices(colwise, rowwise, output_layout)

    def _partition_fn(self, name: str, module: Module, mesh: DeviceMesh) -> None:
        for key, dim in self.slices.dims(module, mesh, mesh.size("tp")).items():
            distribute_parameter(module, key, mesh, [Shard(0), Shard(dim)])

    def _token_dispatch(
        self, module: Module, inputs: tuple[Any, ...], mesh: DeviceMesh, num_experts: int
    ) -> tuple[tuple[Any, ...], DispatchContext]:
        (rows, counts), context = super()._token_dispatch(module, inputs, mesh["ep"], num_experts)
        return (mesh.platform.copy_to_group(rows, mesh.get_group("tp")), counts), context

    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: DispatchContext) -> Any:
        reduced = self.slices.reduce(mesh.platform, routed_output, mesh.get_group("tp"))
        return super()._token_combine(module, reduced, mesh["ep"], context)


class TensorSlices:
    """Which dim of which expert weight tensor parallelism splits, and what becomes of the partial sums. Immutable."""

    def __init__(self, colwise: Sequence[str], rowwise: Sequence[str], output_layout: Placement | None) -> None:
        if output_layout is not None and output_layout not in (Replicate(), Partial()):
            raise ValueError(f"output_layout={output_layout!r}: choose Replicate() or Partial()")
        if set(colwise) & set(rowwise):
            raise ValueError(f"{sorted(set(colwise) & set(rowwise))} are both colwise and rowwise; choose one for each")
        self.colwise, self.rowwise = tuple(colwise), tuple(rowwise)
        self.output_layout = output_layout or Replicate()

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
                    f"parameter {key!r} of shape {shape} cannot be split in dim {dims[key]} by the tp dimension {ranks}; "
                    f"weights are [experts, out, in], and the split dim must be a multiple of {ranks}"
                )
        return dims

    def reduce(self, platform: Any, partial: Any, group: Any) -> Any:
        """Sum the slices' terms over *group*, unless the caller asked to do it."""
        return partial if self.output_layout == Partial() else platform.reduce_from_group(partial, group)


def require_mesh(style: str, mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    """Check the dimensions of a mesh; one without names goes by order.

    Raises:
        ValueError: another number of dimensions, or other names.
    """
    wanted = "[" + ", ".join(names) + "]"
    if mesh.ndim != len(names) or mesh.mesh_dim_names not in (None, names):
        raise ValueError(
            f"{style} needs a {len(names)}-D mesh {wanted}, but got {mesh}; make one with init_device_mesh(platform, "
            f"shape, {names}), or take a sub-mesh by its names"
        )
    if mesh.mesh_dim_names is None:
        groups = [mesh.get_group(d) for d in range(mesh.ndim)]
        return DeviceMesh(mesh.platform, mesh.ranks, names, groups, mesh.native)
    return mesh


def require_experts(style: str, module: Module, mesh: DeviceMesh) -> int:
    """The number of experts of a module, from the first dim of its parameters; checked before anything is changed.

    Raises:
        ValueError: there are no parameters, they disagree on dim 0, or one is distributed already.
    """
    parameters = mesh.platform.parameters(module)
    if not parameters:
        raise ValueError(f"{style}: the module has no parameters; apply the style to the module that holds the experts")
    for name, parameter in parameters.items():
        sharding = mesh.platform.sharding(parameter)
        if sharding is not None:
            raise ValueError(
                f"{style}: parameter {name!r} is distributed already, as {list(sharding.placements)}; a style is applied "
                "once, to a module with whole parameters, and before data parallelism"
            )
    sizes = {name: int(parameter.shape[0]) if len(parameter.shape) > 1 else None for name, parameter in parameters.items()}
    if None in sizes.values() or len(set(sizes.values())) != 1:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        raise ValueError(
            f"{style}: dim 0 of every parameter must be the expert, the same number for all, but the shapes are {shapes}; "
            "apply the style to the experts, not to the layer around them"
        )
    return next(size for size in sizes.values() if size is not None)
