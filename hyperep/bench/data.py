# SPDX-License-Identifier: Apache-2.0
"""The numbers that a benchmark runs on, drawn by shape and rank alone: all ways of a layer get the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperep.bench.shapes import Shape
from hyperep.exchange.faults import dtype_bytes
from hyperep.platform.protocol import Platform

__all__ = ["Data", "random"]


class Data:
    """What one rank's tokens are, and where they go."""

    def __init__(self, platform: Platform[Any], shape: Shape, rank: int, ranks: int | None = None) -> None:
        self.platform, self.shape = platform, shape
        choices = shape.choices(rank, platform.world_size if ranks is None else ranks)
        self.count = len(choices)
        """Tokens of this rank."""
        rng = np.random.default_rng([21, rank])
        self.tokens = random(platform, shape.dtype, rng, (self.count, shape.dim))
        self.cotangent = random(platform, shape.dtype, rng, (self.count, shape.dim))
        self.choices = platform.from_host(choices)
        weights = rng.uniform(0.5, 1.5, size=(self.count, shape.top_k)) / shape.top_k
        self.weights = platform.from_host(weights.astype(np.float32))

    @property
    def rows(self) -> int:
        """Choices of this rank."""
        return self.count * self.shape.top_k

    @property
    def token_bytes(self) -> int:
        """Size of a token."""
        return self.shape.dim * dtype_bytes(self.tokens.dtype)

    def expert_weights(self) -> dict[str, Any]:
        """The whole weights of the routed experts, the same on all ranks."""
        shape, rng = self.shape, np.random.default_rng(22)
        wide, narrow = (shape.experts, shape.hidden, shape.dim), (shape.experts, shape.dim, shape.hidden)
        sizes = (("w1", wide), ("w2", narrow), ("w3", wide))
        return {name: random(self.platform, shape.dtype, rng, size) for name, size in sizes}

    def shared_weights(self) -> tuple[Any, Any, Any, Any]:
        """Those of the shared experts, as one, and the size of its only group."""
        shape, rng = self.shape, np.random.default_rng(23)
        hidden = shape.shared * shape.hidden
        wide, narrow = (1, hidden, shape.dim), (1, shape.dim, hidden)
        w1, w2, w3 = (random(self.platform, shape.dtype, rng, size) for size in (wide, narrow, wide))
        return w1, w2, w3, self.platform.from_host(np.array([self.count], dtype=np.int64))


def random(platform: Platform[Any], dtype: str, rng: np.random.Generator, size: Sequence[int]) -> Any:
    """Numbers of a scale that keeps products of order one."""
    values = rng.standard_normal(tuple(size), dtype=np.float32)
    if len(size) == 3:
        values *= size[-1] ** -0.5
    return platform.xp.astype(platform.from_host(values), getattr(platform.xp, dtype))
