# SPDX-License-Identifier: Apache-2.0
"""The wire and the arithmetic of a layer, each without the other: what hiding one behind the other can come to.

A first run writes down every exchange. Then ``wire`` issues the same ones, one after the other, and ``arithmetic`` runs
the layer with what has arrived then in place of each exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.bench.between import Between, Route
from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.shapes import Shape
from hyperep.bench.timing import wait
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Platform
from hyperep.styles import ParallelStyle

__all__ = ["Apart"]


@dataclass(frozen=True, eq=False)
class _Exchange:
    """One exchange as it was issued, and what arrived."""

    sent: Any
    route: Route
    arrived: Any


@dataclass(frozen=True, eq=False)
class _Arrived:
    """Work that is done."""

    value: Any

    def wait(self) -> Any:
        """The value."""
        return self.value


class _Tape(Between):
    """Writes down a platform's exchanges, and plays them again without the wire."""

    def __init__(self, platform: Platform[Any]) -> None:
        super().__init__(platform)
        self.exchanges: list[_Exchange] = []
        self._place: int | None = None

    def rewind(self) -> None:
        """From now on play what was written down, from the beginning."""
        self._place = 0

    def _exchange(self, x: Any, route: Route, async_op: bool) -> Any:
        if self._place is None:
            self.exchanges.append(_Exchange(x, route, self._platform.all_to_all_single(x, *route)))
            arrived = self.exchanges[-1].arrived
        else:
            arrived = self.exchanges[self._place].arrived
            self._place += 1
        return _Arrived(arrived) if async_op else arrived


class Apart:
    """The two parts of a layer of *shape* under a style, forward and backward. Collective over the mesh."""

    def __init__(self, mesh: DeviceMesh, shape: Shape, style: ParallelStyle) -> None:
        platform = mesh.platform
        self._platform = platform
        self._tape: Any = _Tape(platform)
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        taped = DeviceMesh(self._tape, mesh.ranks, mesh.mesh_dim_names, groups)
        self._layer = Layer(Data(self._tape, shape, platform.rank), taped, style)
        wait(platform, self._layer.forward_backward())

    def arithmetic(self) -> Any:
        """Everything but the exchanges."""
        self._tape.rewind()
        return self._layer.forward_backward()

    def wire(self) -> list[Any]:
        """The exchanges and nothing else."""
        return [self._platform.all_to_all_single(e.sent, *e.route) for e in self._tape.exchanges]
