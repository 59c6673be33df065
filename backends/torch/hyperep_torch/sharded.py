# SPDX-License-Identifier: Apache-2.0
"""Layouts and meshes of the core as DTensors and device meshes of PyTorch, and the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import DeviceMesh as NativeMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from hyperep.mesh import DeviceMesh
from hyperep.placements import Partial, Placement, Replicate, Shard
from hyperep.sharding import Sharding
from hyperep_torch.groups import SELF
from hyperep_torch.world import World, ensure_process_group

__all__ = ["Meshes", "from_native_placement", "to_native_placement"]


def to_native_placement(placement: Placement) -> Any:
    """PyTorch's placement of the same meaning."""
    if isinstance(placement, Shard):
        if placement.parts > 1:
            return _StridedShard(placement.dim, split_factor=placement.parts)
        return dtensor.Shard(placement.dim)
    if isinstance(placement, Partial):
        return dtensor.Partial(placement.reduce_op)
    return dtensor.Replicate()


def from_native_placement(placement: Any) -> Placement:
    """The core's placement of the same meaning.

    Raises:
        ValueError: there is none, as for the strided shards of FSDP2.
    """
    # By exact class: PyTorch's strided shard is a kind of shard, but does not lie in rank order.
    if type(placement) is dtensor.Shard:
        return Shard(placement.dim)
    if type(placement) is dtensor.Replicate:
        return Replicate()
    if type(placement) is dtensor.Partial:
        return Partial(placement.reduce_op)
    raise ValueError(
        f"the placement {placement!r} of a DTensor has no counterpart in hyperep, which knows Shard, Replicate and "
        "Partial; redistribute the DTensor to these first"
    )


def _from_native_placements(placements: Sequence[Any]) -> tuple[Placement, ...]:
    """The core's placements; a strided shard that is alone on its tensor dim is one of several parts."""
    sharded = [p.dim for p in placements if isinstance(p, dtensor.Shard | _StridedShard)]
    return tuple(
        Shard(p.dim, parts=p.split_factor)
        if type(p) is _StridedShard and sharded.count(p.dim) == 1
        else from_native_placement(p)
        for p in placements
    )


class Meshes:
    """The pairs of core mesh and native mesh that one platform has met.

    A native mesh is made from the groups of the core's mesh, once; an adopted one is used as it is, because FSDP2 and
    DTensor compare meshes by their root.
    """

    def __init__(self, platform: Any, world: World) -> None:
        self._platform = platform
        self._world = world
        self._made: dict[DeviceMesh, NativeMesh] = {}
        self._made_for: dict[NativeMesh, DeviceMesh] = {}
        self._adopted: dict[NativeMesh, DeviceMesh] = {}

    def adopt(self, native: NativeMesh) -> DeviceMesh:
        """The core's view of *native*.

        Raises:
            ValueError: it is a mesh of another kind of device.
        """
        known = self._adopted.get(native)
        if known is not None and known.native is native:  # PyTorch's meshes are equal where their ranks and names are
            return known
        if native.device_type != self._world.kind.type:
            raise ValueError(
                f"the mesh {native!r} is one of {native.device_type!r} devices, but the platform is on "
                f"{self._world.kind.type!r}; make the mesh with that device type"
            )
        member = native.get_coordinate() is not None
        groups = [native.get_group(d) if member else None for d in range(native.ndim)]
        mesh = DeviceMesh(self._platform, native.mesh.numpy(), native.mesh_dim_names, groups, native)
        self._adopted[native] = mesh
        return mesh

    def native(self, mesh: DeviceMesh) -> NativeMesh:
        """The native mesh of *mesh*; made of its groups if it has none."""
        if mesh.native is not None:
            return mesh.native  # type: ignore[return-value]
        if mesh not in self._made:
            groups = [self._process_group(mesh.get_group(d)) for d in range(mesh.ndim)]
            made = _from_groups(groups, self._world.kind.type, mesh)
            self._made[mesh], self._made_for[made] = made, mesh
        return self._made[mesh]

    def sharding(self, tensor: DTensor) -> Sharding:
        """The layout of a DTensor."""
        # A mesh that was made here may have got names that the core's does not have.
        mesh = self._made_for.get(tensor.device_mesh) or self.adopt(tensor.device_mesh)
        return Sharding(mesh, _from_native_placements(tensor.placements))

    def from_local(self, local: torch.Tensor, sharding: Sharding) -> DTensor:
        """The DTensor of which this rank holds *local*."""
        shape = sharding.global_shape(local.shape)
        return DTensor.from_local(
            local,
            self.native(sharding.mesh),
            [to_native_placement(p) for p in sharding.placements],
            run_check=False,
            # Parts are equal by the core's rule, so the whole shape needs no communication.
            shape=torch.Size(shape),
            stride=_contiguous_stride(shape),
        )

    def _process_group(self, group: Any) -> Any:
        return ensure_process_group(self._world) if group is SELF else group


def _from_groups(groups: Sequence[dist.ProcessGroup], device_type: str, mesh: DeviceMesh) -> NativeMesh:
    if mesh.ndim == 1:
        return NativeMesh.from_group(
            groups[0], device_type, mesh=mesh.ranks.tolist(), mesh_dim_names=mesh.mesh_dim_names
        )
    # PyTorch wants names for a mesh of several dimensions.
    names = mesh.mesh_dim_names or tuple(f"dim{d}" for d in range(mesh.ndim))
    return NativeMesh.from_group(
        list(groups), device_type, mesh=torch.from_numpy(mesh.ranks.copy()), mesh_dim_names=names
    )


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()
