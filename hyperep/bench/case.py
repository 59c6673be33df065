# SPDX-License-Identifier: Apache-2.0
"""One shape on one rank: the layer, its limit and the naive way, on the same data and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hyperep.bench.naive import naive_experts
from hyperep.bench.shapes import Shape
from hyperep.mesh import DeviceMesh
from hyperep.styles import ExpertParallel

__all__ = ["Case", "WrongResult"]


class WrongResult(ArithmeticError):
    """Two ways of the same layer disagree, so that comparing their times would mean nothing."""


class Case:
    """The routed layer, called as a module with a parallel style; the shared experts, if any, beside it."""

    def __init__(self, mesh: DeviceMesh, shape: Shape) -> None:
        self.mesh, self.shape, self.platform = mesh, shape, mesh.platform
        ranks, rank = mesh.size(), mesh.get_local_rank()
        self.all_counts = shape.all_counts(ranks)  # [R, R, L]
        self.input_splits = self.all_counts[rank].sum(axis=1).tolist()
        self.output_splits = self.all_counts[:, rank].sum(axis=1).tolist()
        rng = np.random.default_rng([21, rank])
        self.counts = self.platform.from_host(self.all_counts[rank].ravel())
        self.rows = self._random(rng, (shape.rows, shape.dim))
        self.cotangent = self._random(rng, (shape.rows, shape.dim))
        self.experts = self._experts()
        ExpertParallel().apply(self.experts, mesh)
        self.parameters = self.platform.parameters(self.experts)
        self._limit = self._limit_data(rng, sum(self.output_splits))
        self._shared = self._shared_data(rng) if shape.shared else None

    # ------------------------------------------------------------------------------------------- contestants
    def forward(self) -> Any:
        """The layer, forward."""
        return self._layer(*self._primals())

    def forward_backward(self) -> Any:
        """The layer, forward and backward: gradients of what goes in and of the weights."""
        return self._record(self._layer)()

    def forward_recorded(self) -> Callable[[], Any]:
        """The layer, forward, for a backward to follow; calling the result is the backward."""
        return self._record(self._layer)

    def naive_forward_backward(self) -> Any:
        """The same the naive way."""
        return self._record(self._naive)()

    def limit(self) -> list[Any]:
        """The exchanges of the same bytes and dense products of the same arithmetic, and nothing else."""
        xp, group = self.platform.xp, self.mesh.get_group()
        sent, received = self.input_splits, self.output_splits
        for _ in ("rows", "gradients"):
            out: list[Any] = [self.platform.all_to_all_single(self.rows, received, sent, group)]
            out.append(self.platform.all_to_all_single(self._limit[0][0], sent, received, group))
        for x, hidden, weight in self._limit:
            turned, hidden_turned = xp.permute_dims(weight, (1, 0)), xp.permute_dims(hidden, (1, 0))
            for _ in ("w1", "w2", "w3"):
                # Each weight: a product in forward, one for the rows' gradient and one for its own.
                out = [x @ turned, hidden @ weight, hidden_turned @ x]
        return out

    def check_naive(self) -> None:
        """Compare the naive way's result and gradients with the layer's.

        Raises:
            WrongResult: they differ.
        """
        for name, got, want in zip(
            ("the rows", "x", *self.parameters),
            (self._naive(*self._primals()), *self.naive_forward_backward()),
            (self._layer(*self._primals()), *self.forward_backward()),
            strict=False,
        ):
            a, b = (x.astype(np.float64) for x in self.platform.to_host(got, want))
            error = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
            if not error < (1e-4 if self.shape.dtype == "float32" else 5e-2):
                raise WrongResult(f"{self.shape.name}: the naive way differs from the layer in {name} by {error:.1e}")

    # ------------------------------------------------------------------------------------------------- parts
    def _primals(self) -> list[Any]:
        return [self.rows] if self._shared is None else [self.rows, self._shared[0]]

    def _layer(self, rows: Any, *tokens: Any) -> Any:
        out = self.experts(rows, self.counts)
        return (out, self._shared_experts(*tokens)) if tokens else out

    def _naive(self, rows: Any, *tokens: Any) -> Any:
        weights = {name: self.platform.local(parameter) for name, parameter in self.parameters.items()}
        out = naive_experts(self.mesh, weights, rows, self.counts)
        return (out, self._shared_experts(*tokens)) if tokens else out

    def _shared_experts(self, tokens: Any) -> Any:
        assert self._shared is not None
        _, _, w1, w2, w3, size = self._shared
        return self.platform.grouped_swiglu(tokens, w1, w2, w3, size)

    def _record(self, function: Callable[..., Any]) -> Callable[[], Any]:
        _, pullback = self.platform.vjp(function, *self._primals(), parameters=list(self.parameters.values()))
        cotangents = [self.cotangent] if self._shared is None else [self.cotangent, self._shared[1]]
        return lambda: pullback(*cotangents)

    def weights(self) -> dict[str, Any]:
        """The whole weights of the routed experts, the same on all ranks."""
        shape, rng = self.shape, np.random.default_rng(22)
        wide, narrow = (shape.experts, shape.hidden, shape.dim), (shape.experts, shape.dim, shape.hidden)
        return {name: self._random(rng, size) for name, size in (("w1", wide), ("w2", narrow), ("w3", wide))}

    def _experts(self) -> Any:
        """A module as ``hyperep.moe.GroupedExperts`` makes it, in the shape's dtype."""
        platform = self.platform

        def forward(m: Any, rows: Any, counts: Any) -> Any:
            return platform.grouped_swiglu(rows, m.w1, m.w2, m.w3, counts)

        return platform.make_module("GroupedExperts", self.weights(), forward)

    def _limit_data(self, rng: np.random.Generator, received: int) -> list[tuple[Any, Any, Any]]:
        """Rows, hidden rows and a weight, for the routed experts and for the shared ones."""
        shape = self.shape
        sizes = [(received, shape.hidden)]
        if shape.shared:
            sizes.append((shape.tokens, shape.shared * shape.hidden))
        return [
            tuple(self._random(rng, size) for size in ((rows, shape.dim), (rows, hidden), (hidden, shape.dim)))
            for rows, hidden in sizes
        ]

    def _shared_data(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Tokens, their cotangent, the three weights, and the size of the only group."""
        shape = self.shape
        hidden = shape.shared * shape.hidden
        sizes = [(shape.tokens, shape.dim)] * 2 + [
            (1, hidden, shape.dim),
            (1, shape.dim, hidden),
            (1, hidden, shape.dim),
        ]
        return (
            *(self._random(rng, size) for size in sizes),
            self.platform.from_host(np.array([shape.tokens], dtype=np.int64)),
        )

    def _random(self, rng: np.random.Generator, size: Sequence[int]) -> Any:
        """Of a scale that keeps products of order one."""
        values = rng.standard_normal(tuple(size), dtype=np.float32)
        if len(size) == 3:
            values *= size[-1] ** -0.5
        xp = self.platform.xp
        return xp.astype(self.platform.from_host(values), getattr(xp, self.shape.dtype))
