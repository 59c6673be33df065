# SPDX-License-Identifier: Apache-2.0
"""``Sharding``: how a tensor is laid out over a mesh, and the arithmetic that follows from it.

The idea of a layout as an immutable value follows JAX's ``NamedSharding`` and DTensor's placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard

__all__ = ["ShardedTensor", "Sharding", "gather_tensor", "local_part", "shard_tensor", "whole_shape"]


@dataclass(frozen=True)
class Sharding:
    """A mesh and one placement for each of its dimensions.

    Where several mesh dimensions shard the same tensor dim, the first one splits it first. Parts are always equal:
    a size that does not divide is an error, never padded.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "placements", tuple(self.placements))
        if len(self.placements) != self.mesh.ndim:
            raise ValueError(
                f"{len(self.placements)} placements {self.placements} for a mesh of {self.mesh.ndim} dimensions"
            )
        sharded = [p.dim for p in self.placements if isinstance(p, Shard)]
        for placement in self.placements:
            if isinstance(placement, Shard) and placement.parts > 1 and sharded.count(placement.dim) > 1:
                raise ValueError(
                    f"{placement} beside another mesh dimension that shards dim {placement.dim}: {self.placements}; a "
                    "dim of several parts is split over one mesh dimension only"
                )
        wrong = [p for p in self.placements if not isinstance(p, Shard | Replicate | Partial)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is not a placement; use Shard(dim), Replicate() or Partial()")

    def local_shape(self, global_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one rank's part of a tensor of *global_shape*.

        Raises:
            ValueError: a sharded dim does not exist or its size does not divide.
        """
        shape = list(global_shape)
        for dimension, placement in enumerate(self.placements):
            if isinstance(placement, Shard):
                ranks = self.mesh.shape[dimension]
                if placement.dim >= len(shape):
                    raise ValueError(f"{placement} on a tensor of shape {tuple(global_shape)}, which has no such dim")
                if shape[placement.dim] % (ranks * placement.parts):
                    parts = f" in each of {placement.parts} parts" if placement.parts > 1 else ""
                    raise ValueError(
                        f"dim {placement.dim} of shape {tuple(global_shape)} is not divisible{parts} by the {ranks} "
                        f"ranks of mesh dimension {_name(self.mesh, dimension)}; choose sizes or a mesh that divide "
                        "evenly"
                    )
                shape[placement.dim] //= ranks
        return tuple(shape)

    def global_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole tensor, of which each rank holds *local_shape*."""
        shape = list(local_shape)
        for ranks, placement in zip(self.mesh.shape, self.placements, strict=True):
            if isinstance(placement, Shard):
                shape[placement.dim] *= ranks
        return tuple(shape)

    @property
    def parts(self) -> dict[int, int]:
        """How many parts a sharded tensor dim has, by dim."""
        return {p.dim: p.parts for p in self.placements if isinstance(p, Shard)}

    def local_slices(self, global_shape: Sequence[int]) -> tuple[slice, ...]:
        """This rank's part of a tensor of *global_shape*, one slice a dim.

        Raises:
            ValueError: its part is not one run, because a dim has several parts.
        """
        self.local_shape(global_shape)
        if any(parts > 1 for parts in self.parts.values()):
            raise ValueError(f"{self.placements}: a rank's part of a dim of several parts is no slice of it")
        start, stop = [0] * len(global_shape), list(global_shape)
        coordinate = self.require_member()
        for ranks, here, placement in zip(self.mesh.shape, coordinate, self.placements, strict=True):
            if isinstance(placement, Shard):
                part = (stop[placement.dim] - start[placement.dim]) // ranks
                start[placement.dim] += here * part
                stop[placement.dim] = start[placement.dim] + part
        return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))

    def require_member(self) -> tuple[int, ...]:
        """This rank's position in the mesh.

        Raises:
            ValueError: it is not in it.
        """
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {self.mesh.platform.rank} is not in {self.mesh}")
        return coordinate

    def __repr__(self) -> str:
        return f"Sharding({self.mesh!r}, {list(self.placements)})"


@dataclass(frozen=True, eq=False)
class ShardedTensor:
    """One rank's part of a distributed tensor, on platforms that have no such type of their own."""

    local: Any
    sharding: Sharding

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.sharding.global_shape(self.local.shape)


def whole_shape(platform: Any, parameter: Any) -> tuple[int, ...]:
    """Shape of a whole parameter or buffer, of which this rank may hold a part.

    A parameter's own ``shape`` need not say: to its framework a shard may be a parameter like any other.
    """
    sharding = platform.sharding(parameter)
    local = tuple(platform.local(parameter).shape)
    return local if sharding is None else sharding.global_shape(local)


def described(platform: Any, parameter: Any) -> str:
    """What ranks must have in common of a parameter or buffer: its dtype and whole shape."""
    return f"{platform.local(parameter).dtype} of shape {whole_shape(platform, parameter)}"


def shard_tensor(tensor: Any, sharding: Sharding) -> Any:
    """This rank's part of *tensor*, as held by the first rank of the mesh.

    Broadcasting from one rank makes the shards parts of one tensor even where ranks drew different random weights.
    ``Partial`` keeps the value on the first rank of that dimension and zeros elsewhere. Collective over the mesh.
    """
    platform = sharding.mesh.platform
    sharding.local_shape(tensor.shape)
    sharding.require_member()
    for dimension in range(sharding.mesh.ndim):
        tensor = platform.broadcast(tensor, 0, sharding.mesh.get_group(dimension))
    for dimension, placement in enumerate(sharding.placements):
        if isinstance(placement, Partial) and sharding.mesh.get_local_rank(dimension):
            tensor = platform.xp.zeros_like(tensor) if placement.reduce_op == "sum" else tensor
    return local_part(platform.xp, tensor, sharding)


def local_part(xp: Any, whole: Any, sharding: Sharding) -> Any:
    """This rank's part of the tensor *whole*, of namespace *xp*."""
    shape, split = sharding.local_shape(whole.shape), [*whole.shape]
    parts = {dim: count for dim, count in sharding.parts.items() if count > 1}
    for dim in sorted(parts, reverse=True):  # [..., n, ...] -> [..., parts, n / parts, ...]
        split[dim : dim + 1] = [parts[dim], split[dim] // parts[dim]]
    moved = Sharding(
        sharding.mesh,
        tuple(
            Shard(p.dim + sum(1 for dim in parts if dim <= p.dim)) if isinstance(p, Shard) else p
            for p in sharding.placements
        ),
    )
    slices = moved.local_slices(split)
    if not slices:
        return whole
    return xp.reshape(xp.reshape(whole, tuple(split))[slices], shape) if parts else whole[slices]


def gather_tensor(local: Any, sharding: Sharding) -> Any:
    """The whole tensor on every rank, from each rank's *local* part. Collective over the mesh, not recorded."""
    platform = sharding.mesh.platform
    xp = platform.xp
    # Undone in reverse: of two mesh dimensions on one tensor dim, the later one made the finer cut.
    for dimension in reversed(range(sharding.mesh.ndim)):
        group, placement = sharding.mesh.get_group(dimension), sharding.placements[dimension]
        if isinstance(placement, Partial):
            local = platform.all_reduce(local, group, placement.reduce_op)
        elif isinstance(placement, Shard):
            to_front = (placement.dim, *(d for d in range(local.ndim) if d != placement.dim))
            back = tuple(to_front.index(d) for d in range(local.ndim))
            whole = platform.all_gather(xp.permute_dims(local, to_front), group)  # [R * n, ...]
            if placement.parts > 1:  # [R, parts, n / parts, ...] -> [parts, R, n / parts, ...]
                ranks, (rows, *rest) = sharding.mesh.shape[dimension], whole.shape
                split = (ranks, placement.parts, rows // (ranks * placement.parts), *rest)
                order = (1, 0, *range(2, len(split)))
                whole = xp.reshape(xp.permute_dims(xp.reshape(whole, split), order), whole.shape)
            local = xp.permute_dims(whole, back)
    return local


def _name(mesh: DeviceMesh, dimension: int) -> str:
    return repr(mesh.mesh_dim_names[dimension]) if mesh.mesh_dim_names else str(dimension)
