# SPDX-License-Identifier: Apache-2.0
"""Meshes: shapes, names, coordinates, groups and sub-meshes, on loopback."""

import copy

import numpy as np
import pytest

import hyperep
from hyperep.loopback import run


def _sum(platform, mesh, dim=None):
    """The ranks of this rank's line along a dimension, found by communicating."""
    return int(platform.all_reduce(np.array([10**platform.rank]), mesh.get_group(dim))[0])


def test_two_dimensions():
    def on_rank(platform):
        mesh = hyperep.init_device_mesh(platform, (2, 3), ("ep", "tp"))
        assert (mesh.shape, mesh.ndim, mesh.size(), mesh.size("ep"), mesh.size(1)) == ((2, 3), 2, 6, 2, 3)
        assert mesh.mesh_dim_names == ("ep", "tp")
        assert mesh.get_coordinate() == (mesh.get_local_rank("ep"), mesh.get_local_rank("tp"))
        assert mesh.get_coordinate() == divmod(platform.rank, 3)
        row, column = divmod(platform.rank, 3)
        assert _sum(platform, mesh, "tp") == sum(10 ** (3 * row + c) for c in range(3))
        assert _sum(platform, mesh, "ep") == sum(10 ** (3 * r + column) for r in range(2))

    run(on_rank, 6)


def test_dimensions_from_the_end():
    def on_rank(platform):
        mesh = hyperep.init_device_mesh(platform, (2, 3), ("ep", "tp"))
        row, column = divmod(platform.rank, 3)
        assert (mesh.size(-1), mesh.size(-2)) == (3, 2)
        assert (mesh.get_local_rank(-2), mesh.get_local_rank(-1)) == (row, column)
        assert (mesh.get_group(-2), mesh.get_group(-1)) == (mesh.get_group("ep"), mesh.get_group("tp"))
        for outside in (-3, 2):
            with pytest.raises(ValueError, match=f"mesh dimension {outside} does not exist; this mesh has 2"):
                mesh.get_group(outside)

    run(on_rank, 6)


def test_sub_meshes():
    def on_rank(platform):
        mesh = hyperep.init_device_mesh(platform, (2, 2, 2), ("dp", "ep", "tp"))
        d, e, t = mesh.get_coordinate()
        assert mesh["ep"].ranks.tolist() == [4 * d + 2 * i + t for i in range(2)]
        assert mesh["ep"].get_local_rank() == e
        assert mesh["dp", "tp"].ranks.tolist() == [[4 * i + 2 * e + j for j in range(2)] for i in range(2)]
        assert mesh["tp", "dp"].ranks.tolist() == [[4 * i + 2 * e + j for i in range(2)] for j in range(2)]
        assert mesh["tp", "dp"].get_coordinate() == (t, d)
        assert mesh["dp", "ep", "tp"] is mesh
        assert _sum(platform, mesh["tp", "dp"], "dp") == 10 ** (2 * e + t) + 10 ** (4 + 2 * e + t)

    run(on_rank, 8)


def test_ranks_outside_the_mesh():
    def on_rank(platform):
        mesh = hyperep.init_device_mesh(platform, (2,), ("ep",))
        if platform.rank < 2:
            assert mesh.get_local_rank() == platform.rank
            return
        assert mesh.get_coordinate() is None
        for use in (mesh.get_group, mesh.get_local_rank):
            with pytest.raises(ValueError, match=r"rank 2 is not in this mesh of ranks \[0, 1\]"):
                use()

    run(on_rank, 3)


def test_meshes_are_values():
    def on_rank(platform):
        mesh, same = (hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp")) for _ in range(2))
        other = hyperep.init_device_mesh(platform, (1, 1), ("tp", "ep"))
        assert mesh == same
        assert hash(mesh) == hash(same)
        assert mesh != other
        assert copy.deepcopy(mesh) is mesh
        assert "ep=1, tp=1" in repr(mesh)
        with pytest.raises(ValueError, match="read-only"):
            mesh.ranks[0, 0] = 1

    run(on_rank, 1)
