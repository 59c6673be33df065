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
    """Each rank of the mesh dimension holds an equal, contiguous part of tensor dim ``dim``, in rank order.

    A dim may hold several things one after the other, as where two weights are packed into one::

        Shard(0, parts=2) of [a0 a1 a2 a3 | b0 b1 b2 b3] on two ranks:  [a0 a1 | b0 b1], [a2 a3 | b2 b3]
    """

    dim: int
    parts: int = 1
    """Of each of so many equal parts of the dim, one after the other, a rank holds its part."""

    def __post_init__(self) -> None:
        if not isinstance(self.parts, int) or isinstance(self.parts, bool) or self.parts < 1:
            raise ValueError(f"Shard(parts={self.parts!r}): parts must be an int, 1 or more")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 0:
            raise ValueError(
                f"Shard(dim={self.dim!r}): dim must be a non-negative int; count tensor dims from the front"
            )

    def __repr__(self) -> str:
        return f"Shard({self.dim})" if self.parts == 1 else f"Shard({self.dim}, parts={self.parts})"


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
