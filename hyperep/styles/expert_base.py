# SPDX-License-Identifier: Apache-2.0
"""``BaseExpertParallel``: expert parallelism with its steps left open."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Module
from hyperep.platform.selection import adopt_mesh
from hyperep.styles.checks import require_experts, require_mesh
from hyperep.styles.style import ParallelStyle

__all__ = ["BaseExpertParallel"]


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

        def routed(module: Module, experts: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
            if len(inputs) != 2:
                raise TypeError(
                    f"{type(self).__name__} wraps a module called as experts(rows, tokens_per_expert), but it was "
                    f"called with {len(inputs)} positional inputs; apply the style to the experts, not to the layer "
                    "around them"
                )
            local_inputs, context = self._token_dispatch(module, inputs, mesh, num_experts)
            return self._token_combine(module, experts(*local_inputs, **kwargs), mesh, context)

        # An argument and not part of the closure: a deep copy of the module then hands itself to the steps, and does
        # not keep the original alive.
        mesh.platform.wrap_forward(module, functools.partial(routed, module))
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
