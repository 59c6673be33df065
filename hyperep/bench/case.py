# SPDX-License-Identifier: Apache-2.0
"""One shape on one rank: the routed layer, its limits, the exchange of rows and the naive way, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hyperep.bench.apart import Apart
from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.limit import Limit
from hyperep.bench.naive import naive_layer
from hyperep.bench.shapes import Shape
from hyperep.bench.way import Way
from hyperep.exchange.load import load_figures
from hyperep.mesh import DeviceMesh
from hyperep.styles import ExpertParallel

__all__ = ["Case", "WrongResult"]


class WrongResult(ArithmeticError):
    """Two ways of the same layer disagree, so that comparing their times would mean nothing."""


class Case:
    """The contestants of one shape; *way* is that of the layer that is measured."""

    def __init__(self, mesh: DeviceMesh, shape: Shape, way: Way) -> None:
        self.mesh, self.shape, self.platform, self.way = mesh, shape, mesh.platform, way
        data = Data(self.platform, shape, mesh.get_local_rank(), mesh.size())
        self.layer = Layer(data, mesh, way.style)
        self.by_rows = Layer(data, mesh, ExpertParallel(exchange="rows"))
        # Its experts are not called; it has parameters of its own, so that their gradients are too.
        self.naive = Layer(data, mesh, ExpertParallel(), self._naive_experts)
        placement = way.placement(shape, mesh.size())
        self.limit = Limit(mesh, shape, placement)
        self.rows_limit = self.limit if placement is None else Limit(mesh, shape)
        self.load = load_figures(shape.counts(mesh.size()).reshape(mesh.size(), shape.experts), placement)
        # Where exchanges are hidden: how long the layer waits for them otherwise, and what there is to hide.
        self.waiting = Layer(data, mesh, way.waiting.style) if way.chunks != 1 else None
        self.apart = Apart(mesh, shape, way.waiting.style) if way.chunks != 1 else None

        self.plain = Layer(data, mesh, ExpertParallel(exchange=way.exchange)) if way.balance else None

    def contestants(self, naive: bool) -> dict[str, Callable[[], Any]]:
        """What is timed, by the names of the record."""
        own = {
            "forward": self.layer.forward,
            "forward_backward": self.layer.forward_backward,
            "limit": self.limit.tokens,
            "rows_limit": self.rows_limit.rows,
            "rows": self.by_rows.forward_backward,
        }
        if self.waiting is not None and self.apart is not None:
            own |= {"waiting": self.waiting.forward_backward, "wire": self.apart.wire}
            own |= {"arithmetic": self.apart.arithmetic}
        if self.plain is not None:
            own["plain"] = self.plain.forward_backward
        return own | ({"naive": self.naive.forward_backward} if naive else {})

    def check(self, naive: bool) -> None:
        """Compare results and gradients of the other ways with the layer's.

        Raises:
            WrongResult: they differ.
        """
        names = ("the tokens", "tokens", "weights", *self.layer.parameters)
        wanted = (self.layer.forward(), *self.layer.forward_backward())
        others = {"exchange of rows": self.by_rows, "layer without chunks": self.waiting}
        others["layer without copies"] = self.plain
        for way, other in (others | {"naive way": self.naive if naive else None}).items():
            if other is None:
                continue
            for name, got, want in zip(names, (other.forward(), *other.forward_backward()), wanted, strict=True):
                a, b = (x.astype(np.float64) for x in self.platform.to_host(got, want))
                error = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
                if not error < (1e-4 if self.shape.dtype == "float32" else 5e-2):
                    raise WrongResult(f"{self.shape.name}: the {way} differs from the layer in {name} by {error:.1e}")

    def _naive_experts(self, tokens: Any, choices: Any, weights: Any, *, rows: int) -> Any:
        return naive_layer(self.mesh, self.naive.local_parameters(), tokens, choices, weights)
