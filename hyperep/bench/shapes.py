# SPDX-License-Identifier: Apache-2.0
"""The sizes of a layer to measure, the presets, and which rows go to which expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np

from hyperep import workloads
from hyperep.exchange.balance import Placement
from hyperep.workloads import draws

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
    """Part of all rows that goes to the first ``hot_experts`` experts, beside their even share of the rest; with the
    workload ``uniform`` alone."""
    hot_experts: int = 1
    workload: str = "uniform"
    """Where tokens go: a name of :mod:`hyperep.workloads`."""
    trace: str | None = None
    """The file of the workload ``trace``; ``None`` is the one that comes with hyperep."""

    @property
    def rows(self) -> int:
        """Choices of a rank with all its tokens: what they are to the experts."""
        return self.tokens * self.top_k

    def choices(self, rank: int, ranks: int) -> np.ndarray:
        """The experts of each token of *rank*, int64 ``[T, K]``: its workload's, or with ``hot`` those of a hot expert.

        Raises:
            ValueError: there is no such workload, or its trace is of other sizes.
        """
        if self.hot:
            rng = np.random.default_rng([20, rank])
            sizes = (self.tokens, self.experts, self.top_k)
            return draws.repeating(rng, *sizes, hot=self.hot_experts, share=self.hot)
        return workloads.choices(
            self.workload,
            **{"tokens": self.tokens, "experts": self.experts, "top_k": self.top_k, "ranks": ranks, "rank": rank},
            trace=None if self.trace is None else _read(self.trace),
        )

    def counts(self, ranks: int) -> np.ndarray:
        """Choices by source rank, owner, and expert of the owner, int64 ``[R, R, L]``."""
        self.check(ranks)
        found = [np.bincount(self.choices(rank, ranks).ravel(), minlength=self.experts) for rank in range(ranks)]
        return np.stack(found).reshape(ranks, ranks, self.experts // ranks)

    def copies(self, ranks: int, owners: int | None = None) -> np.ndarray:
        """Tokens by source rank and owner (a rank, or a node) of one of their experts, int64 ``[R, O]``."""
        self.check(ranks)
        owners = ranks if owners is None else owners
        by_rank = [self.choices(rank, ranks) // (self.experts // owners) for rank in range(ranks)]  # [T, K] each
        return np.array(
            [[(owner == of).any(axis=1).sum() for of in range(owners)] for owner in by_rank], dtype=np.int64
        )

    def placed_copies(self, placement: Placement) -> np.ndarray:
        """Tokens by source rank and rank that computes one of their choices by a *placement*, int64 ``[R, R]``."""
        ranks = placement.ranks
        found = np.zeros((ranks, ranks), dtype=np.int64)
        for source in range(ranks):
            choices = self.choices(source, ranks)
            order = choices.argsort(axis=None, kind="stable")
            at = np.empty(choices.size, dtype=np.int64)
            at[order] = placement.places(source) // placement.width
            found[source] = [(at.reshape(choices.shape) == rank).any(axis=1).sum() for rank in range(ranks)]
        return found

    def check(self, ranks: int) -> None:
        """Whether the shape can be spread over *ranks*.

        Raises:
            ValueError: the experts do not divide by the ranks, or are fewer than a token chooses; there is no such
                workload, or its trace is of other sizes.
            OSError: there is no such trace.
        """
        if self.workload not in workloads.NAMES:
            raise ValueError(f"unknown workload {self.workload!r}; choose one of {', '.join(workloads.NAMES)}")
        if self.top_k > self.experts:
            raise ValueError(f"shape {self.name!r} has {self.experts} experts, of which no token can have {self.top_k}")
        if self.experts % ranks:
            raise ValueError(
                f"shape {self.name!r} has {self.experts} experts, which do not divide by {ranks} ranks; choose a "
                f"number of ranks that divides {self.experts}"
            )
        if self.workload == "trace":
            dataclasses.replace(self, tokens=1).choices(0, ranks)


@cache
def _read(path: str) -> workloads.Trace:
    return workloads.read_trace(path)


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
