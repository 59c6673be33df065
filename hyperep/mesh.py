# SPDX-License-Identifier: Apache-2.0
"""``DeviceMesh``: ranks arranged in a grid with named dimensions, and the groups along them.

A mesh has *dimensions* with names; a tensor has *dims*.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperep.platform.protocol import Group, Platform

__all__ = ["DeviceMesh", "init_device_mesh"]


class DeviceMesh:
    """An n-dimensional grid of world ranks, seen from one rank. Immutable; equal if ranks, names and platform are.

    Made by :func:`init_device_mesh`, by slicing another mesh with names, or by a platform that adopts a native mesh.

    Args:
        platform: the platform of this rank.
        ranks: integer array of the world ranks; its shape is the mesh's shape.
        mesh_dim_names: one name a dimension, or ``None`` for a mesh whose dimensions go by number.
        groups: one group handle per dimension, that of this rank's line along it (``None`` outside the mesh).
        native: the framework's own mesh, if this one was adopted from it.
        parent: the mesh that this one is a slice of.
    """

    __slots__ = ("_coordinate", "_groups", "_names", "_native", "_parent", "_platform", "_ranks")

    def __init__(
        self,
        platform: Platform[Any],
        ranks: np.ndarray,
        mesh_dim_names: Sequence[str] | None,
        groups: Sequence[Group],
        native: object = None,
        parent: DeviceMesh | None = None,
    ) -> None:
        self._platform = platform
        self._ranks = np.array(ranks, dtype=np.int64)
        self._ranks.setflags(write=False)
        self._names = None if mesh_dim_names is None else tuple(mesh_dim_names)
        self._groups = tuple(groups)
        self._native = native
        self._parent = parent
        _check_names(self._ranks.shape, self._names)
        found = np.argwhere(self._ranks == platform.rank)
        self._coordinate = tuple(int(i) for i in found[0]) if len(found) else None

    @property
    def platform(self) -> Platform[Any]:
        """The platform whose ranks these are."""
        return self._platform

    @property
    def ranks(self) -> np.ndarray:
        """World ranks, in the mesh's shape (read-only)."""
        return self._ranks

    @property
    def native(self) -> object:
        """The framework's own mesh that this one was adopted from, or sliced from; else ``None``."""
        # A native mesh is sliced natively, so that the framework still sees one root mesh (FSDP2 requires that); and
        # only when somebody asks, because that is slow, and a forward that slices its mesh needs the groups alone.
        if self._native is None and self._parent is not None and self._parent.native is not None:
            self._native = self._parent.native[self._names]  # type: ignore[index]
        return self._native

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._ranks.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return self._ranks.shape

    @property
    def mesh_dim_names(self) -> tuple[str, ...] | None:
        """Name of each dimension, or ``None``."""
        return self._names

    def size(self, dim: int | str | None = None) -> int:
        """Number of ranks along a dimension, or in the whole mesh."""
        return self._ranks.size if dim is None else self._ranks.shape[self._index(dim)]

    def get_group(self, dim: int | str | None = None) -> Group:
        """The group of this rank's line along a dimension, which may be left out on a 1-D mesh.

        Raises:
            ValueError: no dimension was given for a mesh of several, or this rank is not in the mesh.
        """
        self._require_member("get_group")
        return self._groups[self._line(dim, "get_group")]

    def get_local_rank(self, dim: int | str | None = None) -> int:
        """This rank's position along a dimension, which may be left out on a 1-D mesh."""
        return self._require_member("get_local_rank")[self._line(dim, "get_local_rank")]

    def get_coordinate(self) -> tuple[int, ...] | None:
        """This rank's position in the mesh; ``None`` if it is not in it."""
        return self._coordinate

    def __getitem__(self, names: str | tuple[str, ...]) -> DeviceMesh:
        """The sub-mesh through this rank that keeps only the named dimensions, in the order given."""
        wanted = (names,) if isinstance(names, str) else tuple(names)
        if not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(f"mesh[{names!r}]: name at least one dimension, each once; this mesh has {self._names}")
        if wanted == self._names:
            return self
        kept = [self._index(name) for name in wanted]
        here = self._require_member(f"mesh[{names!r}]")
        fixed = tuple(slice(None) if d in kept else here[d] for d in range(self.ndim))
        in_mesh_order = sorted(kept)
        ranks = self._ranks[fixed].transpose([in_mesh_order.index(d) for d in kept])
        return DeviceMesh(self._platform, ranks, wanted, [self._groups[d] for d in kept], parent=self)

    def _index(self, dim: int | str) -> int:
        if isinstance(dim, str):
            if self._names is None or dim not in self._names:
                raise ValueError(f"mesh dimension {dim!r} does not exist; this mesh has {self._names or self.shape}")
            return self._names.index(dim)
        if not -self.ndim <= dim < self.ndim:
            raise ValueError(f"mesh dimension {dim} does not exist; this mesh has {self.ndim} dimensions")
        return dim % self.ndim

    def _line(self, dim: int | str | None, what: str) -> int:
        if dim is not None:
            return self._index(dim)
        if self.ndim != 1:
            raise ValueError(f"{what}() on a mesh of dimensions {self._names or self.shape}: say which one")
        return 0

    def _require_member(self, what: str) -> tuple[int, ...]:
        if self._coordinate is None:
            raise ValueError(f"{what}: rank {self._platform.rank} is not in this mesh of ranks {self._ranks.tolist()}")
        return self._coordinate

    def _key(self) -> tuple[object, ...]:
        return (self._platform.name, self._ranks.shape, tuple(self._ranks.flat), self._names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceMesh) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __copy__(self) -> DeviceMesh:
        return self

    def __deepcopy__(self, memo: Mapping[int, object]) -> DeviceMesh:
        # A value; group handles cannot be copied, and modules that are deep-copied hold meshes in their shardings.
        return self

    def __repr__(self) -> str:
        names = self._names or tuple(str(d) for d in range(self.ndim))
        dims = ", ".join(f"{name}={size}" for name, size in zip(names, self.shape, strict=True))
        return f"DeviceMesh({self._platform.name}: {dims}; ranks={self._ranks.tolist()})"


def init_device_mesh(
    platform: Platform[Any], shape: Sequence[int], mesh_dim_names: Sequence[str] | None = None
) -> DeviceMesh:
    """Arrange the first ``prod(shape)`` ranks of the world in a grid, row-major, and make the groups along it.

    Collective: every rank of the world calls it with the same arguments, also those that fall outside the mesh.

    Raises:
        ValueError: the shape is empty, has a size below one or one that is no whole number; a name is missing or given
            twice, or the names are one string; or the mesh is larger than the world.
        TypeError: *platform* is none, such as ``None`` or a name.
    """
    if not hasattr(platform, "new_group"):
        raise TypeError(
            f"init_device_mesh(platform={platform!r}): give a platform, as hyperep.get_platform(name) returns it, and "
            "then the shape"
        )
    sizes = _sizes(shape)
    if isinstance(mesh_dim_names, str):
        raise ValueError(
            f"mesh_dim_names={mesh_dim_names!r} is one string; give a name for each dimension of shape {sizes}, as in "
            f"({mesh_dim_names!r},)"
        )
    names = None if mesh_dim_names is None else tuple(mesh_dim_names)
    _check_names(sizes, names)
    needed = math.prod(sizes)
    if needed > platform.world_size:
        raise ValueError(
            f"a mesh of shape {sizes} needs {needed} ranks, but the world has {platform.world_size}; "
            f"launch at least {needed} ranks or choose a smaller shape"
        )
    ranks = np.arange(needed, dtype=np.int64).reshape(sizes)
    return DeviceMesh(platform, ranks, names, [_own_group(platform, ranks, dim) for dim in range(len(sizes))])


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(f"mesh shape {shape!r} must be whole numbers, one for each dimension, as in (2, 4)") from None
    if not sizes or min(sizes) < 1:
        raise ValueError(f"mesh shape {sizes} must have at least one dimension, each of size 1 or more")
    return sizes


def _own_group(platform: Platform[Any], ranks: np.ndarray, dim: int) -> Group:
    """Make the groups of every line along *dim*, in one order on all ranks; return this rank's own."""
    own: Group = None
    for line in np.moveaxis(ranks, dim, -1).reshape(-1, ranks.shape[dim]).tolist():
        group = platform.new_group(line)
        if platform.rank in line:
            own = group
    return own


def _check_names(shape: tuple[int, ...], names: tuple[str, ...] | None) -> None:
    strings = names is not None and all(isinstance(name, str) for name in names)
    if names is not None and (not strings or len(names) != len(shape) or len(set(names)) != len(names)):
        raise ValueError(f"mesh_dim_names={names} must hold one distinct name for each dimension of shape {shape}")
