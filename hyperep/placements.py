# SPDX-License-Identifier: Apache-2.0
"""Placements: how a tensor lies along one dimension of a mesh (the terms of PyTorch's DTensor)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Partial", "Placement", "Replicate", "Shard"]


@dataclass(frozen=True)
class Placement:
    """Base of the three placements; immutable, comparable and hashable."""


@dataclass(frozen=True)
class Shard(Placement):
    """Each rank of the mesh dimension holds an equal, contiguous part of tensor dim ``dim``, in rank order."""

    dim: int

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 0:
            raise ValueError(
                f"Shard(dim={self.dim!r}): dim must be a non-negative int; count tensor dims from the front"
            )

    def __repr__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Replicate(Placement):
    """Each rank of the mesh dimension holds the whole tensor."""

    def __repr__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Partial(Placement):
    """Each rank of the mesh dimension holds a term; the tensor is their reduction by ``reduce_op``."""

    reduce_op: str = "sum"

    def __post_init__(self) -> None:
        if self.reduce_op not in ("sum", "max", "min"):
            raise ValueError(f"Partial(reduce_op={self.reduce_op!r}): choose 'sum', 'max' or 'min'")

    def __repr__(self) -> str:
        return f"Partial({self.reduce_op!r})"
