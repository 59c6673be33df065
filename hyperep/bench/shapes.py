# SPDX-License-Identifier: Apache-2.0
"""The sizes of a layer to measure, the presets, and which rows go to which expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

__all__ = ["PRESETS", "Shape", "preset"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer, and the load that one rank puts on it."""

    name: str
    tokens: int
    """Tokens of each rank."""
    dim: int
    """``D``."""
    hidden: int
    """``H`` of each expert."""
    experts: int
    """``E``, over all ranks."""
    top_k: int
    """``K``: a rank sends ``tokens * K`` rows."""
    shared: int = 0
    """Experts that every token goes to, on its own rank; as one of ``shared * H``."""
    dtype: str = "float32"
    hot: float = 0.0
    """Part of all rows that goes to the first ``hot_experts`` experts, beside their even share of the rest."""
    hot_experts: int = 1

    @property
    def rows(self) -> int:
        """Rows that one rank sends to routed experts."""
        return self.tokens * self.top_k

    def counts(self, rank: int) -> np.ndarray:
        """Rows of *rank* for each expert, int64 ``[E]``: drawn evenly, but for the hot experts."""
        rng = np.random.default_rng([20, rank])
        hot_rows = round(self.rows * self.hot)
        counts = rng.multinomial(self.rows - hot_rows, np.full(self.experts, 1.0 / self.experts))
        counts[: self.hot_experts] += rng.multinomial(hot_rows, np.full(self.hot_experts, 1.0 / self.hot_experts))
        return counts.astype(np.int64)

    def all_counts(self, ranks: int) -> np.ndarray:
        """The counts of all ranks, int64 ``[R, R, L]``: by source rank, owner, and expert of the owner.

        Raises:
            ValueError: the experts do not divide by the ranks.
        """
        self.check(ranks)
        return np.stack([self.counts(rank).reshape(ranks, -1) for rank in range(ranks)])

    def check(self, ranks: int) -> None:
        """Whether the shape can be spread over *ranks*.

        Raises:
            ValueError: the experts do not divide by the ranks.
        """
        if self.experts % ranks:
            raise ValueError(
                f"shape {self.name!r} has {self.experts} experts, which do not divide by {ranks} ranks; choose a "
                f"number of ranks that divides {self.experts}"
            )


PRESETS: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape(name="coarse", tokens=2048, dim=512, hidden=1024, experts=8, top_k=2),
            Shape(name="fine", tokens=2048, dim=512, hidden=128, experts=64, top_k=6),
            Shape(name="finest", tokens=2048, dim=256, hidden=64, experts=128, top_k=8),
            # The routed layer of DeepSeek-V3's 16B configuration as trained by torchtitan; for GPUs.
            Shape(
                name="dsv3-16b", tokens=16384, dim=2048, hidden=1408, experts=64, top_k=6, shared=2, dtype="bfloat16"
            ),
        )
    }
)
"""Few large experts, many small ones, very many very small ones, and a layer of a published model."""


def preset(name: str) -> Shape:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown shape {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
