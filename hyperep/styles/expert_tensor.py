# SPDX-License-Identifier: Apache-2.0
"""``ExpertTensorParallel``: experts over one mesh dimension, slices of them over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hyperep.exchange.balance import Balance
from hyperep.exchange.routed import RoutedExperts, in_slices
from hyperep.exchange.rows import DispatchContext
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement, Shard
from hyperep.platform.protocol import Module
from hyperep.styles.calls import LocalExperts
from hyperep.styles.expert import Exchange, ExpertParallel
from hyperep.styles.expert_base import Around
from hyperep.styles.slices import TensorSlices

__all__ = ["ExpertTensorParallel"]


class ExpertTensorParallel(ExpertParallel):
    """Experts are split over ``ep``, and each of them is sliced over ``tp``.

    ============= ===========================================================================================
    mesh          2-D ``[ep, tp]``; with levels one dimension for each, then ``tp``
    weights       ``w1``, ``w3``: ``[Shard(0), Shard(1)]``; ``w2``: ``[Shard(0), Shard(2)]``
    input         own per ``ep`` rank, replicated over ``tp``
    output        as the input; or ``Partial`` over ``tp`` on request
    backward      both that of :class:`ExpertParallel` and that of :class:`TensorParallel`
    ============= ===========================================================================================

    Tokens travel within each ``ep`` group only, and the sums over ``tp`` are taken once for each token, after its
    experts were added up. Arguments are those of :class:`ExpertParallel` and :class:`TensorParallel`.
    """

    def __init__(
        self,
        *,
        colwise: Sequence[str] = ("w1", "w3"),
        rowwise: Sequence[str] = ("w2",),
        output_layout: Placement | None = None,
        exchange: Exchange = "tokens",
        levels: Sequence[str] = ("ep",),
        chunks: int | Literal["auto"] = 1,
        balance: Balance | None = None,
        packed: Mapping[str, int] | None = None,
        interleaved: Mapping[str, int] | None = None,
        transposed: bool = False,
        buffers: Mapping[str, Placement | Sequence[Placement]] | None = None,
    ) -> None:
        super().__init__(exchange=exchange, levels=levels, chunks=chunks, balance=balance, buffers=buffers)
        if "tp" in self.levels:
            raise ValueError(f"levels={self.levels}: experts are sliced over 'tp', so it is no level of theirs")
        self.mesh_dim_names = (*self.levels, "tp")
        self.slices = TensorSlices(
            tuple(colwise), tuple(rowwise), output_layout, packed or {}, interleaved or {}, transposed
        )

    def _settings(self) -> list[str]:
        return [*super()._settings(), repr(self.slices)]

    def _sliced(self, module: Module, mesh: DeviceMesh) -> frozenset[int]:
        biases = self.slices.added_once(module, mesh)
        if self.balance is not None and biases:
            raise ValueError(
                f"{type(self).__name__}({self.balance}): {list(biases)} are added by one rank of tp alone, and "
                "an expert that is copied would be by all; leave out balance"
            )
        return self.slices.sizes(module, mesh, mesh.size("tp"))

    def _laid_out(self, name: str, module: Module, mesh: DeviceMesh) -> Mapping[str, Sequence[Placement]]:
        sliced = self.slices.placements(module, mesh, mesh.size("tp"), name)
        return {key: (*(Shard(0),) * len(self.levels), placement) for key, placement in sliced.items()}

    def _around_own(self, module: Module, mesh: DeviceMesh) -> Around:
        biases = self.slices.added_once(module, mesh)
        return lambda module, inner: self.slices.adding_once(inner, module, mesh, biases)

    def _of_tokens(self, module: Module, experts: LocalExperts, mesh: DeviceMesh, num_experts: int) -> RoutedExperts:
        routed = super()._of_tokens(module, experts, mesh, num_experts)
        group, platform = mesh.get_group("tp"), mesh.platform
        if self.exchange == "tokens":
            return in_slices(routed, platform, group, reduce=self.slices.reduced)
        if self.slices.reduced:
            return routed  # summed where the rows are, so that the weights meet whole ones

        def partial(tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
            return routed(tokens, indices, platform.copy_to_group(weights, group), rows=rows)

        return partial

    def _token_dispatch(
        self, module: Module, inputs: tuple[Any, ...], mesh: DeviceMesh, num_experts: int
    ) -> tuple[tuple[Any, ...], DispatchContext]:
        (rows, counts), context = super()._token_dispatch(module, inputs, mesh["ep"], num_experts)
        return (mesh.platform.copy_to_group(rows, mesh.get_group("tp")), counts), context

    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: DispatchContext) -> Any:
        reduced = self.slices.reduce(mesh.platform, routed_output, mesh.get_group("tp"))
        return super()._token_combine(module, reduced, mesh["ep"], context)
