# SPDX-License-Identifier: Apache-2.0
"""``TensorParallel``: every rank holds a slice of every expert."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyperep.distribute import distribute_parameter
from hyperep.exchange.routed import added_to, in_slices
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.styles.buffers import plan_buffers, shard_buffers
from hyperep.styles.calls import ROWS, LocalExperts, declared_calls, require_call
from hyperep.styles.checks import require_experts, require_mesh
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
        colwise: names of the weights whose output features are split (tensor dim 1).
        rowwise: names of the weights whose input features are split (tensor dim 2).
        output_layout: ``Replicate()``, or ``Partial()`` for callers that reduce (or reduce-scatter) themselves.
        packed: how many weights a colwise weight holds one after the other, by name: ``{"gate_up": 2}`` for
            ``[E, 2 H, D]`` with all gates first. A rank then gets its part of each.
        interleaved: how many weights a colwise weight holds whose rows take turns.
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
        buffers: Mapping[str, Placement | Sequence[Placement]] | None = None,
    ) -> None:
        self.slices = TensorSlices(tuple(colwise), tuple(rowwise), output_layout, packed or {}, interleaved or {})
        self.buffers = dict(buffers or {})

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Slice the experts' weights and reduce where slices meet. Errors as for :class:`BaseExpertParallel`."""
        mesh = require_mesh(type(self).__name__, adopt_mesh(mesh), self.mesh_dim_names)
        style = type(self).__name__
        num_experts = require_experts(style, module, mesh, [repr(self.slices), f"buffers={self.buffers}"])
        takes = declared_calls(style, module)
        sizes = self.slices.sizes(module, mesh, mesh.size())
        buffers = plan_buffers(style, module, mesh, self.buffers, sliced=sizes)
        with watched(mesh.platform, module):
            for part in mesh.platform.named_modules(module).values():
                for key, shard in self.slices.shards(part, mesh, mesh.size()).items():
                    distribute_parameter(part, key, mesh, [shard])
            shard_buffers(module, mesh, buffers)
        group, platform = mesh.get_group(), mesh.platform

        def sliced(
            inner: Callable[..., Any],
            *inputs: Any,
            rows: int | None = None,
            meanwhile: Module | None = None,
            **kwargs: Any,
        ) -> Any:
            experts = functools.partial(inner, **kwargs) if kwargs else inner
            if require_call(style, takes, inputs) == ROWS:
                x, counts = inputs
                out = self.slices.reduce(platform, experts(platform.copy_to_group(x, group), counts), group)
            else:
                routed = LocalExperts(platform, experts, takes, num_experts).routed
                out = in_slices(routed, platform, group, reduce=self.slices.reduced)(*inputs, rows=rows)
            return added_to(out, meanwhile, inputs[0])

        platform.wrap_forward(module, sliced)
        return module
