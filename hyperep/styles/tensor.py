# SPDX-License-Identifier: Apache-2.0
"""``TensorParallel``: every rank holds a slice of every expert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperep.distribute import lay_out
from hyperep.exchange.routed import added_to, in_slices
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.styles.buffers import plan_buffers, shard_buffers
from hyperep.styles.calls import ROWS, LocalExperts, declared_calls, require_call
from hyperep.styles.checks import note_applied, require_experts, require_mesh, warn_of_unlike
from hyperep.styles.identity import watched
from hyperep.styles.slices import TensorSlices
from hyperep.styles.style import ParallelStyle

__all__ = ["TensorParallel"]


class TensorParallel(ParallelStyle):
    """Every rank holds a slice of every expert; tokens are replicated and do not travel.

    ============= ===========================================================================================
    mesh          1-D ``tp``
    weights       ``w1``, ``w3`` ``[E, H, D]``: ``Shard(1)``; ``w2`` ``[E, D, H]``: ``Shard(2)``
    input         replicated over ``tp``: tokens, or rows sorted by expert
    output        replicated, after an all-reduce of the row-parallel product; or ``Partial`` on request
    backward      input gradient all-reduced over ``tp``, so that everything below the experts gets all of it
    ============= ===========================================================================================

    The pair of reductions is Megatron-LM's (arXiv:1909.08053).

    Args:
        colwise: names of the weights ``[E, out, in]`` whose output features are split, and of their biases
            ``[E, out]``; each by itself or with its path below the experts.
        rowwise: names of the weights whose input features are split, and of their biases, which stay whole and are
            added by one rank.
        output_layout: ``Replicate()``, or ``Partial()`` for callers that reduce (or reduce-scatter) themselves.
        packed: how many weights a colwise weight holds one after the other, by name: ``{"gate_up": 2}`` for
            ``[E, 2 H, D]`` with all gates first. A rank then gets its part of each.
        interleaved: how many weights a colwise weight holds whose rows take turns.
        transposed: whether weights are ``[E, in, out]``.
        buffers: placements of buffers whose shape does not tell whether they are split, by path.
    """

    mesh_dim_names: tuple[str, ...] = ("tp",)

    def __init__(
        self,
        *,
        colwise: Sequence[str] = ("w1", "w3"),
        rowwise: Sequence[str] = ("w2",),
        output_layout: Placement | None = None,
        packed: Mapping[str, int] | None = None,
        interleaved: Mapping[str, int] | None = None,
        transposed: bool = False,
        buffers: Mapping[str, Placement | Sequence[Placement]] | None = None,
    ) -> None:
        self.slices = TensorSlices(
            tuple(colwise), tuple(rowwise), output_layout, packed or {}, interleaved or {}, transposed
        )
        self.buffers = dict(buffers or {})

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Slice the experts' weights and reduce where slices meet. Errors as for :class:`BaseExpertParallel`."""
        style = type(self).__name__
        mesh, num_experts, takes, buffers = self._checked(module, mesh)
        warn_of_unlike(style, module, mesh)
        biases = self.slices.added_once(module, mesh)
        with watched(mesh.platform, module):
            for path, part in mesh.platform.named_modules(module).items():
                for key, placements in self._laid_out(path, part, mesh).items():
                    lay_out(part, key, mesh, placements)
            shard_buffers(module, mesh, buffers)
        note_applied(style, module, mesh)
        group, platform = mesh.get_group(), mesh.platform

        def sliced(
            module: Module,
            inner: Callable[..., Any],
            *inputs: Any,
            rows: int | None = None,
            meanwhile: Module | None = None,
            **kwargs: Any,
        ) -> Any:
            own = functools.partial(inner, **kwargs) if kwargs else inner
            own = self.slices.adding_once(own, module, mesh, biases)
            experts = LocalExperts(platform, own, takes, num_experts)
            if require_call(style, takes, inputs) == ROWS:
                x, counts = inputs
                out = self.slices.reduce(platform, experts.rows(platform.copy_to_group(x, group), counts), group)
            else:
                routed = in_slices(experts.routed, platform, group, reduce=self.slices.reduced)
                out = routed(*inputs, rows=rows)
            return added_to(out, meanwhile, inputs[0])

        # An argument and not part of the closure, so that a deep copy looks at its own biases.
        platform.wrap_forward(module, functools.partial(sliced, module))
        return module

    def check(self, module: Module, mesh: DeviceMesh) -> None:
        """Raise what :meth:`apply` would, and change nothing."""
        self._checked(module, mesh)

    def _checked(
        self, module: Module, mesh: DeviceMesh
    ) -> tuple[DeviceMesh, int, tuple[str, ...], Mapping[str, Sequence[Placement]]]:
        """The mesh, how many experts there are, the calls that they take, and the layout of their buffers."""
        style = type(self).__name__
        mesh = require_mesh(style, adopt_mesh(mesh), self.mesh_dim_names)
        settings = [repr(self.slices), f"buffers={self.buffers}"]
        laid_out = functools.partial(self._laid_out, mesh=mesh)
        num_experts = require_experts(style, module, mesh, laid_out, settings)
        takes = declared_calls(style, module)
        sizes = self.slices.sizes(module, mesh, mesh.size())
        buffers = plan_buffers(style, module, mesh, self.buffers, sliced=sizes)
        self.slices.added_once(module, mesh)
        return mesh, num_experts, takes, buffers

    def _laid_out(self, path: str, part: Module, mesh: DeviceMesh) -> Mapping[str, Sequence[Placement]]:
        """How the parameters of a part of the experts lie on *mesh*."""
        return {key: (p,) for key, p in self.slices.placements(part, mesh, mesh.size(), path).items()}
