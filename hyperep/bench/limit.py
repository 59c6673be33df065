# SPDX-License-Identifier: Apache-2.0
"""What no implementation can beat: raw exchanges of what must travel, and dense products of the same arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hyperep.bench.data import random
from hyperep.bench.shapes import Shape
from hyperep.exchange.balance import Placement
from hyperep.mesh import DeviceMesh

__all__ = ["Limit", "Operands"]


class Operands(NamedTuple):
    """What is multiplied. Those that are transposed lie so in memory: some frameworks copy a view first."""

    x: Any
    """``[N, D]``."""
    hidden: Any
    """``[N, H]``."""
    weight: Any
    """``[H, D]``."""
    turned: Any
    """``[D, H]``."""
    hidden_turned: Any
    """``[H, N]``."""


class Limit:
    """The exchanges and products of one rank's part of a layer, on numbers that are random.

    With a *placement* of experts the rows are where it says; what its weights cost to move is not in the limit.
    """

    def __init__(self, mesh: DeviceMesh, shape: Shape, placement: Placement | None = None) -> None:
        self._platform, self._group, self._shape = mesh.platform, mesh.get_group(), shape
        rank, ranks = mesh.get_local_rank(), mesh.size()
        counts = shape.counts(ranks).sum(axis=2)  # [R, R], as copies are
        copies = shape.copies(ranks) if placement is None else shape.placed_copies(placement)
        self._rows, self._copies = ((of[rank].tolist(), of[:, rank].tolist()) for of in (counts, copies))
        self._rng = np.random.default_rng([24, rank])
        self._row_data = self._both(self._rows, shape.dim, shape.dtype)
        self._token_data = self._both(self._copies, shape.dim, shape.dtype)
        self._choice_data = (
            self._random((sum(self._copies[0]), 2 * shape.top_k), "float32"),
            self._random((sum(self._copies[1]), shape.top_k), "float32"),
        )
        rows = sum(self._rows[1]) if placement is None else placement.loads[rank]
        sizes = [(rows, shape.hidden)]
        if shape.shared:
            sizes.append((len(shape.choices(rank, ranks)), shape.shared * shape.hidden))
        self.products = [self._operands(rows, shape.dim, hidden, shape.dtype) for rows, hidden in sizes]
        """For the routed experts and for the shared ones."""

    def tokens(self) -> list[Any]:
        """A token once to each rank that owns one of its experts, there and back, its choices with it; the products."""
        for _ in ("tokens and sums", "their gradients"):
            self._there_and_back(self._copies, self._token_data)
        self._there_and_back(self._copies, self._choice_data)  # numbers and weights; the weights' gradients
        return self._multiply()

    def rows(self) -> list[Any]:
        """A row for each choice, there and back; the products."""
        for _ in ("rows", "gradients"):
            self._there_and_back(self._rows, self._row_data)
        return self._multiply()

    def _there_and_back(self, splits: tuple[list[int], list[int]], data: tuple[Any, Any]) -> None:
        sent, received = splits
        self._platform.all_to_all_single(data[0], received, sent, self._group)
        self._platform.all_to_all_single(data[1], sent, received, self._group)

    def _multiply(self) -> list[Any]:
        out = []
        for of in self.products:
            for _ in ("w1", "w2", "w3"):
                # Each weight: a product in forward, one for the rows' gradient and one for its own.
                out = [of.x @ of.turned, of.hidden @ of.weight, of.hidden_turned @ of.x]
        return out

    def _operands(self, rows: int, dim: int, hidden: int, dtype: str) -> Operands:
        sizes = ((rows, dim), (rows, hidden), (hidden, dim), (dim, hidden), (hidden, rows))
        return Operands(*(self._random(size, dtype) for size in sizes))

    def _both(self, splits: tuple[list[int], list[int]], width: int, dtype: str) -> tuple[Any, Any]:
        sent, received = (self._random((sum(of), width), dtype) for of in splits)
        return sent, received

    def _random(self, size: tuple[int, ...], dtype: str) -> Any:
        return random(self._platform, dtype, self._rng, size)
