# SPDX-License-Identifier: Apache-2.0
"""``ExpertTensorParallel``: experts over one mesh dimension, slices of them over another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperep.distribute import distribute_parameter
from hyperep.exchange.rows import DispatchContext
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement, Shard
from hyperep.platform.protocol import Module
from hyperep.styles.expert import ExpertParallel
from hyperep.styles.slices import TensorSlices

__all__ = ["ExpertTensorParallel"]


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
        self.slices = TensorSlices(tuple(colwise), tuple(rowwise), output_layout)

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
