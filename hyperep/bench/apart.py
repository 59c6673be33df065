# SPDX-License-Identifier: Apache-2.0
"""The wire and the arithmetic of a layer, each without the other: what hiding one behind the other can come to.

A first run writes down every exchange. Then ``wire`` issues the same ones, one after the other, and ``arithmetic`` runs
the layer with what has arrived then in place of each exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.shapes import Shape
from hyperep.bench.timing import wait
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Group, Platform
from hyperep.styles import ParallelStyle

__all__ = ["Apart"]


@dataclass(frozen=True, eq=False)
class _Exchange:
    """One exchange as it was issued, and what arrived."""

    sent: Any
    arguments: tuple[Any, ...]
    arrived: Any


@dataclass(frozen=True, eq=False)
class _Arrived:
    """Work that is done."""

    value: Any

    def wait(self) -> Any:
        """The value."""
        return self.value


class _Tape:
    """Stands before a platform: writes down its exchanges, and plays them again without the wire."""

    def __init__(self, platform: Platform[Any]) -> None:
        self._platform = platform
        self.exchanges: list[_Exchange] = []
        self._place: int | None = None

    def rewind(self) -> None:
        """From now on play what was written down, from the beginning."""
        self._place = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def all_to_all_single(
        self,
        x: Any,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group = None,
        async_op: bool = False,
    ) -> Any:
        """Issue it, or play it."""
        if self._place is None:
            arguments = (output_splits, input_splits, group)
            self.exchanges.append(_Exchange(x, arguments, self._platform.all_to_all_single(x, *arguments)))
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
        return [self._platform.all_to_all_single(e.sent, *e.arguments) for e in self._tape.exchanges]
