# SPDX-License-Identifier: Apache-2.0
"""``ColwiseParallel`` and ``RowwiseParallel``: tensor parallelism of two-dimensional weights (arXiv:1909.08053)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperep.distribute import lay_out, own_parameters
from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.sharding import whole_shape
from hyperep.styles.checks import note_applied, require_alike, require_layouts, require_mesh, warn_of_unlike
from hyperep.styles.identity import watched
from hyperep.styles.style import ParallelStyle

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class ColwiseParallel(ParallelStyle):
    """Each rank holds some rows of the weight, and computes some features of the output.

    ============= ===========================================================================================
    mesh          1-D ``tp``
    weights       ``weight`` ``[out, in]``: ``Shard(0)``; ``bias`` ``[out]``: ``Shard(0)``
    input         replicated over ``tp``
    output        this rank's features: ``Shard`` of the last dim, as :class:`RowwiseParallel` takes it
    backward      input gradient all-reduced over ``tp``
    ============= ===========================================================================================

    Args:
        packed: how many weights the module holds one after the other, as ``gate_up`` of a feed-forward network does: a
            rank gets its part of each. That it holds several cannot be seen here, so it must be said.

    Example:
        >>> import hyperep
        >>> from hyperep.loopback import run
        >>> from hyperep.moe import Linear
        >>> def sharded(platform):
        ...     mesh = hyperep.init_device_mesh(platform, (2,), ("tp",))
        ...     linear = hyperep.ColwiseParallel().apply(Linear(platform, 8, 6), mesh)
        ...     return linear(platform.xp.ones((5, 8))).shape
        >>> run(sharded, world_size=2)
        [(5, 3), (5, 3)]
    """

    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __init__(self, *, packed: int = 1) -> None:
        self._shard = Shard(0, parts=packed)

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Shard *module*, which has a parameter ``weight`` ``[out, in]`` and perhaps ``bias`` ``[out]``.

        Raises:
            ValueError: the mesh has other dimensions, ``out`` is not divisible, or the parameters are others or are
                distributed already in another way.
        """
        mesh, layout = self._checked(module, mesh)
        warn_of_unlike(type(self).__name__, module, mesh)
        with watched(mesh.platform, module):
            for name, placements in layout.items():
                lay_out(module, name, mesh, placements)
        note_applied(type(self).__name__, module, mesh)
        group, platform = mesh.get_group(), mesh.platform

        def sliced(inner: Callable[..., Any], x: Any, *inputs: Any, **kwargs: Any) -> Any:
            return inner(platform.copy_to_group(x, group), *inputs, **kwargs)

        platform.wrap_forward(module, sliced)
        return module

    def check(self, module: Module, mesh: DeviceMesh) -> None:
        """Raise what :meth:`apply` would, and change nothing."""
        self._checked(module, mesh)

    def _checked(self, module: Module, mesh: DeviceMesh) -> tuple[DeviceMesh, dict[str, tuple[Placement, ...]]]:
        """The mesh, and how each parameter lies on it."""
        mesh = require_mesh(type(self).__name__, adopt_mesh(mesh), self.mesh_dim_names)
        layout: dict[str, tuple[Placement, ...]] = {"weight": (self._shard,), "bias": (self._shard,)}
        names = _require_linear(type(self).__name__, module, mesh, 0, layout, self._shard.parts)
        return mesh, {name: layout[name] for name in names}


class RowwiseParallel(ParallelStyle):
    """Each rank holds some columns of the weight, and computes one term of the output.

    ============= ===========================================================================================
    mesh          1-D ``tp``
    weights       ``weight`` ``[out, in]``: ``Shard(1)``; ``bias`` ``[out]``: ``Replicate()``
    input         this rank's features: ``Shard`` of the last dim, as :class:`ColwiseParallel` gives it
    output        replicated, after an all-reduce of the terms; or ``Partial`` on request
    backward      exact, without communication; the bias gets the same gradient on all ranks of ``tp``
    ============= ===========================================================================================

    A module with a bias is called with the keyword ``reduce``, as :func:`hyperep.moe.Linear` takes it, so that the
    terms are summed before the bias is added.

    Args:
        output_layout: ``Replicate()``, or ``Partial()`` for callers that reduce (or reduce-scatter) themselves.
    """

    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __init__(self, *, output_layout: Placement | None = None) -> None:
        if output_layout not in (None, Replicate(), Partial()):
            raise ValueError(f"output_layout={output_layout!r}: choose Replicate() or Partial()")
        self.output_layout = output_layout

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Shard *module*, which has a parameter ``weight`` ``[out, in]`` and perhaps ``bias`` ``[out]``.

        Raises:
            ValueError: the mesh has other dimensions, ``in`` is not divisible, there is a bias but the output is to be
                partial, or the parameters are others or are distributed already in another way.
        """
        mesh, layout = self._checked(module, mesh)
        warn_of_unlike(type(self).__name__, module, mesh)
        partial, biased = self.output_layout == Partial(), "bias" in layout
        with watched(mesh.platform, module):
            for name, placements in layout.items():
                lay_out(module, name, mesh, placements)
        note_applied(type(self).__name__, module, mesh)
        group, platform = mesh.get_group(), mesh.platform

        def reduce(term: Any) -> Any:
            return platform.reduce_from_group(term, group)

        def sliced(inner: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
            if biased:
                return inner(*inputs, reduce=reduce, **kwargs)
            term = inner(*inputs, **kwargs)
            return term if partial else reduce(term)

        platform.wrap_forward(module, sliced)
        return module

    def check(self, module: Module, mesh: DeviceMesh) -> None:
        """Raise what :meth:`apply` would, and change nothing."""
        self._checked(module, mesh)

    def _checked(self, module: Module, mesh: DeviceMesh) -> tuple[DeviceMesh, dict[str, tuple[Placement, ...]]]:
        """The mesh, and how each parameter lies on it."""
        mesh = require_mesh(type(self).__name__, adopt_mesh(mesh), self.mesh_dim_names)
        layout: dict[str, tuple[Placement, ...]] = {"weight": (Shard(1),), "bias": (Replicate(),)}
        names = _require_linear(type(self).__name__, module, mesh, 1, layout)
        if self.output_layout == Partial() and "bias" in names:
            raise ValueError(
                "RowwiseParallel(output_layout=Partial()) on a module with a bias: each rank would add it, and the sum "
                "of the terms would hold it more than once; leave the bias out and add it after your reduction"
            )
        return mesh, {name: layout[name] for name in names}


def _require_linear(
    style: str,
    module: Module,
    mesh: DeviceMesh,
    dim: int,
    layout: Mapping[str, Sequence[Placement]],
    parts: int = 1,
) -> tuple[str, ...]:
    """The names of a linear module's parameters; checked before anything is changed."""
    require_alike(style, module, mesh, [f"{parts} weights in one"])
    parameters = own_parameters(mesh.platform, module)
    shapes = {name: whole_shape(mesh.platform, parameter) for name, parameter in parameters.items()}
    fits = (
        len(shapes.get("weight", ())) == 2 and shapes.get("bias", shapes.get("weight", ())[:1]) == shapes["weight"][:1]
    )
    if not fits or not set(shapes) <= {"weight", "bias"}:
        raise ValueError(
            f"{style}: the module must have parameters 'weight' [out, in] and perhaps 'bias' [out], but has {shapes}; "
            "for experts use TensorParallel, for other modules apply the style to the linear modules in them"
        )
    require_layouts(style, {"": module}, mesh, lambda path, part: layout)
    size, ranks = shapes["weight"][dim], mesh.size()
    if size % (ranks * parts):
        what = ("out", "in")[dim]
        each = f" in each of {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"{style}: {what}={size} features of weight {shapes['weight']} are not divisible{each} by the tp dimension "
            f"{ranks}; choose a multiple of {ranks}, or a tp size that divides {size}"
        )
    return tuple(shapes)
