# SPDX-License-Identifier: Apache-2.0
"""``ParallelStyle``: the base of all styles."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Module

__all__ = ["ParallelStyle"]


class ParallelStyle(ABC):
    """A way to distribute a module over a mesh. Holds settings only; one object may serve many modules."""

    def check(self, module: Module, mesh: DeviceMesh) -> None:  # noqa: B027 (nothing is what a style looks at by default)
        """Raise what :meth:`apply` would refuse *module* with, and change nothing. Collective over the mesh."""

    @abstractmethod
    def apply(self, module: Module, mesh: DeviceMesh) -> Module:
        """Distribute *module* over *mesh*, in place, and return it. Collective over the mesh."""
