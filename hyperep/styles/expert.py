# SPDX-License-Identifier: Apache-2.0
"""``ExpertParallel``: rows travel to the ranks that own their experts."""

from __future__ import annotations

from typing import Any

from hyperep.distribute import distribute_parameter, own_parameters
from hyperep.exchange.rows import DispatchContext, combine, dispatch_agreed
from hyperep.mesh import DeviceMesh
from hyperep.placements import Shard
from hyperep.platform.protocol import Module
from hyperep.styles.expert_base import BaseExpertParallel

__all__ = ["ExpertParallel"]


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
        rows, tokens_per_expert = inputs
        rows, counts, context = dispatch_agreed(rows, tokens_per_expert, mesh, num_experts)
        return (rows, counts), context

    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: DispatchContext) -> Any:
        return combine(routed_output, context)
