# SPDX-License-Identifier: Apache-2.0
"""``BaseExpertParallel``: expert parallelism with its steps left open."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hyperep.exchange.chunks import OverRanksInChunks
from hyperep.exchange.routed import RoutedExperts, RowExperts, added_to, routed_from_rows
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.styles.buffers import plan_buffers, shard_buffers
from hyperep.styles.calls import ROWS, LocalExperts, declared_calls, require_call
from hyperep.styles.checks import note_applied, require_experts, require_mesh, warn_of_unlike
from hyperep.styles.identity import watched
from hyperep.styles.style import ParallelStyle

__all__ = ["Around", "BaseExpertParallel"]

Around = Callable[[Module, Callable[..., Any]], Callable[..., Any]]


class BaseExpertParallel(ParallelStyle):
    """Expert parallelism with its steps left open.

    A subclass says how parameters are partitioned, how rows get to the experts and how they come back. What dispatch
    has to tell combine goes through the context that the one returns and the other takes; never through ``self``. How
    tokens travel it may say too (:meth:`_of_tokens`); unless it does, they are made rows, and travel as such.
    """

    mesh_dim_names: tuple[str, ...] = ("ep",)
    """The mesh that the style wants, by the names of its dimensions."""
    levels: tuple[str, ...] = ("ep",)
    """Those of them over which experts are split, from the slowest link to the fastest."""

    buffers: Mapping[str, Placement | Sequence[Placement]] = MappingProxyType({})
    """Placements of buffers of the experts, by path, for those whose shape does not tell them."""

    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Partition the experts, and route each call to their owners and back.

        Args:
            module: called as ``experts(rows, tokens_per_expert, **kwargs)``, returning one row for each row, or as
                ``experts(tokens, indices, weights, **kwargs)``, returning one row for each token; which of them it
                says by its attribute ``takes`` (see :mod:`hyperep.styles.calls`). From then on it may be called with
                ``meanwhile=``, a module: what that makes of the rows or tokens is added to the result, and is computed
                while these travel, if the style hides that.
            mesh: a hyperep mesh or a native one with the style's dimensions.

        Raises:
            UnsupportedCapability: on all ranks, the platform lacks what an option of the style needs.
            ValueError: on all ranks, the mesh has other dimensions; the number of experts is not divisible; the module
                has no parameters, or some without an expert dim, or some that are distributed already in another way
                than the style's; a rank has others; or a buffer may or may not have an entry for each expert.
        """
        style = type(self).__name__
        mesh, takes, num_experts, buffers = self._checked(module, mesh)
        warn_of_unlike(style, module, mesh)
        ranks = math.prod(mesh.size(name) for name in self.levels)
        with watched(mesh.platform, module):
            for path, submodule in mesh.platform.named_modules(module).items():
                self._partition_fn(path, submodule, mesh)
            shard_buffers(module, mesh, buffers)
        note_applied(style, module, mesh)
        around = self._around_own(module, mesh)

        def called(
            module: Module,
            inner: Callable[..., Any],
            *inputs: Any,
            rows: int | None = None,
            meanwhile: Module | None = None,
            **kwargs: Any,
        ) -> Any:
            call = require_call(style, takes, inputs)
            self._require_arguments(mesh, kwargs)
            local = around(module, functools.partial(inner, **kwargs) if kwargs else inner)
            experts = LocalExperts(mesh.platform, local, takes, num_experts // ranks)
            if call == ROWS:
                return added_to(self._of_rows(module, experts, mesh, num_experts)(*inputs), meanwhile, inputs[0])
            routed = self._of_tokens(module, experts, mesh, num_experts)
            if isinstance(routed, OverRanksInChunks):
                return routed(*inputs, rows=rows, meanwhile=meanwhile)
            return added_to(routed(*inputs, rows=rows), meanwhile, inputs[0])

        # An argument and not part of the closure: a deep copy of the module then hands itself to the steps, and does
        # not keep the original alive.
        mesh.platform.wrap_forward(module, functools.partial(called, module))
        return module

    def check(self, module: Module, mesh: DeviceMesh) -> None:
        """Raise what :meth:`apply` would, and change nothing."""
        self._checked(module, mesh)

    def _checked(
        self, module: Module, mesh: DeviceMesh
    ) -> tuple[DeviceMesh, tuple[str, ...], int, Mapping[str, Sequence[Placement]]]:
        """The mesh, the calls that the experts take, how many they are, and the layout of their buffers."""
        style = type(self).__name__
        mesh = require_mesh(style, adopt_mesh(mesh), self.mesh_dim_names)
        self._require_support(mesh)
        takes = declared_calls(style, module)
        laid_out = functools.partial(self._laid_out, mesh=mesh)
        num_experts = require_experts(style, module, mesh, laid_out, [repr(takes), *self._settings()])
        ranks = math.prod(mesh.size(name) for name in self.levels)
        if num_experts % ranks:
            dims = f"the {' x '.join(self.levels)} dimension{'s' if len(self.levels) > 1 else ''} {ranks}"
            raise ValueError(
                f"num_experts={num_experts} is not divisible by {dims}; choose a multiple of {ranks} experts, or an "
                f"{' x '.join(self.levels)} size that divides {num_experts}"
            )
        buffers = plan_buffers(
            style,
            module,
            mesh,
            self.buffers,
            experts=num_experts,
            levels=len(self.levels),
            sliced=self._sliced(module, mesh),
        )
        self._require_buffers(buffers)
        return mesh, takes, num_experts, buffers

    def _settings(self) -> list[str]:
        """What must be the same on all ranks, in words."""
        return [repr(self.levels), f"buffers={dict(self.buffers)}"]

    def _require_support(self, mesh: DeviceMesh) -> None:
        """Whether the platform can do what the style's options ask for."""

    def _require_buffers(self, split: Collection[str]) -> None:
        """Whether the experts may have these buffers with an entry for each of them."""

    def _require_arguments(self, mesh: DeviceMesh, kwargs: Mapping[str, Any]) -> None:
        """Whether the experts may be called with these keyword arguments of their own."""

    def _sliced(self, module: Module, mesh: DeviceMesh) -> frozenset[int]:
        """Sizes of the experts' weights that are cut besides the number of experts; checks what it looks at."""
        return frozenset()

    def _around_own(self, module: Module, mesh: DeviceMesh) -> Around:
        """What this rank calls in place of the experts' own forward, ``around(module, forward)``."""
        return lambda module, forward: forward

    def _of_rows(self, module: Module, experts: LocalExperts, mesh: DeviceMesh, num_experts: int) -> RowExperts:
        """All experts, called with rows, made of those of this rank."""

        def by_row(*inputs: Any) -> Any:
            local_inputs, context = self._token_dispatch(module, inputs, mesh, num_experts)
            return self._token_combine(module, experts.rows(*local_inputs), mesh, context)

        return by_row

    def _of_tokens(self, module: Module, experts: LocalExperts, mesh: DeviceMesh, num_experts: int) -> RoutedExperts:
        """All experts, called with tokens, made of those of this rank."""
        return routed_from_rows(mesh.platform, self._of_rows(module, experts, mesh, num_experts), num_experts)

    def _laid_out(self, name: str, module: Module, mesh: DeviceMesh) -> Mapping[str, Sequence[Placement]]:
        """How parameters that belong to *module* itself may lie already, by their names; as ``_partition_fn`` does it.

        *name* is its path below the experts.
        """
        return {}

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
