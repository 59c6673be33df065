# SPDX-License-Identifier: Apache-2.0
"""The numbers that a benchmark runs on, drawn by shape and rank alone: all ways of a layer get the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperep.bench.shapes import Shape
from hyperep.platform.protocol import Platform

__all__ = ["Data", "random"]


class Data:
    """What one rank's tokens are, and where they go."""

    def __init__(self, platform: Platform[Any], shape: Shape, rank: int) -> None:
        self.platform, self.shape = platform, shape
        rng = np.random.default_rng([21, rank])
        self.tokens = random(platform, shape.dtype, rng, (shape.tokens, shape.dim))
        self.cotangent = random(platform, shape.dtype, rng, (shape.tokens, shape.dim))
        self.choices = platform.from_host(shape.choices(rank))
        weights = rng.uniform(0.5, 1.5, size=(shape.tokens, shape.top_k)) / shape.top_k
        self.weights = platform.from_host(weights.astype(np.float32))

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
        return w1, w2, w3, self.platform.from_host(np.array([shape.tokens], dtype=np.int64))


def random(platform: Platform[Any], dtype: str, rng: np.random.Generator, size: Sequence[int]) -> Any:
    """Numbers of a scale that keeps products of order one."""
    values = rng.standard_normal(tuple(size), dtype=np.float32)
    if len(size) == 3:
        values *= size[-1] ** -0.5
    return platform.xp.astype(platform.from_host(values), getattr(platform.xp, dtype))
