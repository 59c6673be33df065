# SPDX-License-Identifier: Apache-2.0
"""``ExpertParallel``: tokens travel to the ranks that own their experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from hyperep.distribute import lay_out, own_parameters
from hyperep.exchange.balance import Balance
from hyperep.exchange.balanced import OverRanksBalanced
from hyperep.exchange.calibration import read
from hyperep.exchange.chunks import Auto, OverRanksInChunks
from hyperep.exchange.routed import RoutedExperts, RowExperts, over_ranks, rows_from_routed
from hyperep.exchange.rows import DispatchContext, combine, dispatch_agreed
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement, Shard
from hyperep.platform.capabilities import Capability
from hyperep.platform.protocol import Module
from hyperep.styles.calls import LocalExperts
from hyperep.styles.checks import require_support
from hyperep.styles.expert_base import BaseExpertParallel

__all__ = ["Exchange", "ExpertParallel"]

Exchange = Literal["tokens", "rows"]


class ExpertParallel(BaseExpertParallel):
    """Each rank owns ``E / R`` experts; tokens travel to them by all-to-all.

    ============= ===========================================================================================
    mesh          1-D ``ep``, or one dimension for each level
    weights       ``[E, ...]``: ``Shard(0)``, over each of them
    input         this rank's own tokens, or its own rows sorted by expert
    output        this rank's own, same order
    backward      exact; the gradient of an expert sums the rows of all ranks
    ============= ===========================================================================================

    Args:
        exchange: what travels for a module that is called with tokens. ``"tokens"``: each token once to each rank that
            owns one of its experts, and one sum back. ``"rows"``: each token once for each of its experts, as in GShard
            (arXiv:2006.16668). A module that is called with rows exchanges rows.
        levels: mesh dimensions over which experts are split, from the slowest link to the fastest. With ``("node",
            "ep")`` a token crosses to another node once, and is spread over its ranks there. Rank ``(n, e)`` owns the
            experts that are its in the order of the flattened mesh.
        chunks: in how many parts tokens travel, so that one part is computed while another is on its way, forward and
            backward (:mod:`hyperep.exchange.schedule`). Between nodes on a slow link this takes the time of the larger
            of wire and arithmetic, instead of both; where ranks share a machine it gains nothing. With levels it is the
            first one whose exchange is hidden. ``"auto"`` takes as many as pay by what ``hyperep bench --calibrate``
            wrote on this machine (:mod:`hyperep.exchange.calibration`), one if it did not, and logs why.
        balance: how far loads are evened out, by computing hot experts in several places for a step
            (:mod:`hyperep.exchange.balance`); left out, not at all. With levels it is the last one, whose ranks share a
            machine.
        buffers: placements of buffers whose shape does not tell whether they have an entry for each expert, by path.

    Raises:
        ValueError: another exchange; no level, or one twice; rows in several levels, in chunks or balanced; no chunk;
            or chunks and balance at one level.

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

    exchange: Exchange = "tokens"
    chunks: int | Auto = 1
    balance: Balance | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whoever changes the steps of rows, and does not say how tokens travel, means every call: tokens become rows.
        if {"_token_dispatch", "_token_combine"} & vars(cls).keys() and "_of_tokens" not in vars(cls):
            cls._of_tokens = BaseExpertParallel._of_tokens  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        exchange: Exchange = "tokens",
        levels: Sequence[str] = ("ep",),
        chunks: int | Literal["auto"] = 1,
        balance: Balance | None = None,
        buffers: Mapping[str, Placement | Sequence[Placement]] | None = None,
    ) -> None:
        if exchange not in ("tokens", "rows"):
            raise ValueError(f"exchange={exchange!r}: choose 'tokens' or 'rows'")
        self.exchange = exchange
        self.levels = (levels,) if isinstance(levels, str) else tuple(levels)
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels={levels!r}: name at least one mesh dimension, each once")
        if exchange == "rows" and len(self.levels) > 1:
            raise ValueError(f"exchange='rows' with levels={self.levels}: rows travel in one level; exchange tokens")
        if chunks != "auto" and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            raise ValueError(f"chunks={chunks!r}: give a whole number, 1 or more, or 'auto'")
        if exchange == "rows" and chunks != 1:
            raise ValueError(f"exchange='rows' with chunks={chunks}: rows travel in one part; exchange tokens")
        if exchange == "rows" and balance is not None:
            raise ValueError(f"exchange='rows' with {balance}: rows go to the owners of experts; exchange tokens")
        if chunks != 1 and balance is not None and len(self.levels) == 1:
            raise ValueError(
                f"chunks={chunks!r} with {balance} at one level {self.levels}: experts that are copied come with the "
                "tokens, and not before the first chunk; leave out one, or use two levels, of which the first travels "
                "in chunks and the last is balanced"
            )
        self.balance = balance
        self.chunks = Auto(read()) if chunks == "auto" else chunks
        self.mesh_dim_names = self.levels
        self.buffers = dict(buffers or {})

    def _settings(self) -> list[str]:
        return [*super()._settings(), self.exchange, f"chunks={self.chunks}", repr(self.balance)]

    def _require_support(self, mesh: DeviceMesh) -> None:
        if self.balance is not None:
            hint = f"{self.balance} has experts of other ranks computed in place of a rank's own; leave out balance"
            require_support(mesh.platform, Capability.FUNCTIONAL_CALL, hint)

    def _require_buffers(self, split: Collection[str]) -> None:
        if self.balance is not None and split:
            raise ValueError(
                f"{type(self).__name__}({self.balance}): buffers {sorted(split)} have an entry for each expert, and "
                "parameters alone go to other ranks with an expert that is copied; leave out balance"
            )

    def _require_arguments(self, mesh: DeviceMesh, kwargs: Mapping[str, Any]) -> None:
        tensors = [name for name, value in kwargs.items() if mesh.platform.is_tensor(value)]
        if self.chunks != 1 and tensors:
            raise ValueError(
                f"{type(self).__name__}(chunks={self.chunks}): the experts were called with the tensors {tensors}, "
                "which cannot be cut into chunks, and whose gradients would be lost; leave them out, or choose chunks=1"
            )

    def _laid_out(self, name: str, module: Module, mesh: DeviceMesh) -> Mapping[str, Sequence[Placement]]:
        return {key: (Shard(0),) * mesh.ndim for key in own_parameters(mesh.platform, module)}

    def _partition_fn(self, name: str, module: Module, mesh: DeviceMesh) -> None:
        for key, placements in self._laid_out(name, module, mesh).items():
            lay_out(module, key, mesh, placements)

    def _of_rows(self, module: Module, experts: LocalExperts, mesh: DeviceMesh, num_experts: int) -> RowExperts:
        if len(self.levels) > 1:
            return rows_from_routed(mesh.platform, self._of_tokens(module, experts, mesh, num_experts))
        return super()._of_rows(module, experts, mesh, num_experts)

    def _of_tokens(self, module: Module, experts: LocalExperts, mesh: DeviceMesh, num_experts: int) -> RoutedExperts:
        if self.exchange == "rows":
            return super()._of_tokens(module, experts, mesh, num_experts)
        routed, owned = experts.routed, experts.num_experts
        for level in reversed(self.levels):
            owned *= mesh.size(level)
            if level == self.levels[-1] and self.balance is not None:
                routed = OverRanksBalanced(routed, experts.borrowing(module), mesh[level], owned, self.balance, module)
            elif level == self.levels[0] and self.chunks != 1:
                routed = OverRanksInChunks(routed, mesh[level], owned, self.chunks, module)
            else:
                routed = over_ranks(routed, mesh[level], owned)
        return routed

    def _token_dispatch(
        self, module: Module, inputs: tuple[Any, ...], mesh: DeviceMesh, num_experts: int
    ) -> tuple[tuple[Any, ...], DispatchContext]:
        rows, tokens_per_expert = inputs
        rows, counts, context = dispatch_agreed(rows, tokens_per_expert, mesh, num_experts)
        return (rows, counts), context

    def _token_combine(self, module: Module, routed_output: Any, mesh: DeviceMesh, context: DispatchContext) -> Any:
        return combine(routed_output, context)
