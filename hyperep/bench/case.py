# SPDX-License-Identifier: Apache-2.0
"""One shape on one rank: the routed layer, its limits, the exchange of rows and the naive way, on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.limit import Limit
from hyperep.bench.naive import naive_layer
from hyperep.bench.shapes import Shape
from hyperep.mesh import DeviceMesh
from hyperep.styles import ExpertParallel
from hyperep.styles.expert import Exchange

__all__ = ["Case", "WrongResult"]


class WrongResult(ArithmeticError):
    """Two ways of the same layer disagree, so that comparing their times would mean nothing."""


class Case:
    """The contestants of one shape; *exchange* is what the layer does that is measured."""

    def __init__(self, mesh: DeviceMesh, shape: Shape, exchange: Exchange = "tokens") -> None:
        self.mesh, self.shape, self.platform, self.exchange = mesh, shape, mesh.platform, exchange
        data = Data(self.platform, shape, mesh.get_local_rank())
        self.layer = Layer(data, mesh, ExpertParallel(exchange=exchange))
        self.by_rows = Layer(data, mesh, ExpertParallel(exchange="rows"))
        # Its experts are not called; it has parameters of its own, so that their gradients are too.
        self.naive = Layer(data, mesh, ExpertParallel(), self._naive_experts)
        self.limit = Limit(mesh, shape)

    def contestants(self, naive: bool) -> dict[str, Callable[[], Any]]:
        """What is timed, by the names of the record."""
        own = {
            "forward": self.layer.forward,
            "forward_backward": self.layer.forward_backward,
            "limit": self.limit.tokens,
            "rows_limit": self.limit.rows,
            "rows": self.by_rows.forward_backward,
        }
        return own | ({"naive": self.naive.forward_backward} if naive else {})

    def check(self, naive: bool) -> None:
        """Compare results and gradients of the other ways with the layer's.

        Raises:
            WrongResult: they differ.
        """
        names = ("the tokens", "tokens", "weights", *self.layer.parameters)
        wanted = (self.layer.forward(), *self.layer.forward_backward())
        for way, other in {"exchange of rows": self.by_rows, **({"naive way": self.naive} if naive else {})}.items():
            for name, got, want in zip(names, (other.forward(), *other.forward_backward()), wanted, strict=True):
                a, b = (x.astype(np.float64) for x in self.platform.to_host(got, want))
                error = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
                if not error < (1e-4 if self.shape.dtype == "float32" else 5e-2):
                    raise WrongResult(f"{self.shape.name}: the {way} differs from the layer in {name} by {error:.1e}")

    def _naive_experts(self, tokens: Any, choices: Any, weights: Any, *, rows: int) -> Any:
        return naive_layer(self.mesh, self.naive.local_parameters(), tokens, choices, weights)
