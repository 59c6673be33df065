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
        """Choices of one rank: what its tokens are to the experts."""
        return self.tokens * self.top_k

    def choices(self, rank: int) -> np.ndarray:
        """The experts of each token of *rank*, int64 ``[T, K]``: drawn evenly without repetition, but for the hot ones.

        A hot expert takes the place of choices drawn evenly from all, so one token may have it several times.
        """
        rng = np.random.default_rng([20, rank])
        drawn = rng.random((self.tokens, self.experts)).argpartition(self.top_k - 1, axis=1)[:, : self.top_k]
        flat = drawn.astype(np.int64).ravel()
        hot = rng.permutation(self.rows)[: round(self.rows * self.hot)]
        flat[hot] = rng.integers(0, self.hot_experts, size=len(hot))
        return flat.reshape(self.tokens, self.top_k)

    def counts(self, ranks: int) -> np.ndarray:
        """Choices by source rank, owner, and expert of the owner, int64 ``[R, R, L]``."""
        self.check(ranks)
        found = [np.bincount(self.choices(rank).ravel(), minlength=self.experts) for rank in range(ranks)]
        return np.stack(found).reshape(ranks, ranks, self.experts // ranks)

    def copies(self, ranks: int, owners: int | None = None) -> np.ndarray:
        """Tokens by source rank and owner (a rank, or a node) of one of their experts, int64 ``[R, O]``."""
        self.check(ranks)
        owners = ranks if owners is None else owners
        owner = np.stack([self.choices(rank) // (self.experts // owners) for rank in range(ranks)])  # [R, T, K]
        return np.stack([(owner == of).any(axis=2).sum(axis=1) for of in range(owners)], axis=1)

    def check(self, ranks: int) -> None:
        """Whether the shape can be spread over *ranks*.

        Raises:
            ValueError: the experts do not divide by the ranks, or are fewer than a token chooses.
        """
        if self.top_k > self.experts:
            raise ValueError(f"shape {self.name!r} has {self.experts} experts, of which no token can have {self.top_k}")
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
