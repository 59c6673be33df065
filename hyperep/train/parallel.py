# SPDX-License-Identifier: Apache-2.0
"""How a run is spread over ranks: which style the experts get, and which ranks share data.

The first dimension of the mesh is also the data dimension: each of its ranks has sequences of its own. Ranks along
``tp`` have the same sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.exchange.balance import Balance
from hyperep.mesh import DeviceMesh, init_device_mesh
from hyperep.placements import Shard
from hyperep.platform.protocol import Module, Platform
from hyperep.sharding import Sharding
from hyperep.styles import ExpertParallel, ExpertTensorParallel, ParallelStyle, TensorParallel
from hyperep.train.model import expert_modules
from hyperep.train.settings import Settings

__all__ = ["Parallel", "expert_balance", "parallelize", "sharded_dimensions"]


@dataclass(frozen=True)
class Parallel:
    """A mesh whose first dimension shares out the data; ``None`` for a model that one rank trains alone."""

    mesh: DeviceMesh | None = None

    @property
    def data_ranks(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.mesh is None else self.mesh.shape[0]

    @property
    def data_rank(self) -> int:
        """Which part is this rank's."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(0)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the mesh's dimensions; the first is the data dimension."""
        return () if self.mesh is None else self.mesh.mesh_dim_names or ()


def expert_balance(settings: Settings) -> Balance | None:
    """How far loads are evened out; ``None`` where they are not.

    Here hot experts are copied also where that does not pay: what is trained is small, and is to be seen.
    """
    return Balance(slots=settings.balance_experts, rows_per_copy=0) if settings.balance_experts else None


def parallelize(platform: Platform[Any], model: Module, settings: Settings) -> Parallel:
    """Distribute the experts of *model* over the world, in place, as *settings* say. Collective."""
    groups = platform.world_size // settings.tp
    style: ParallelStyle
    balance = expert_balance(settings)
    if settings.style == "ep":
        mesh = experts_mesh = init_device_mesh(platform, (groups,), ("ep",))
        style = ExpertParallel(balance=balance, chunks=settings.chunks)
    elif settings.style == "etp":
        mesh = experts_mesh = init_device_mesh(platform, (groups, settings.tp), ("ep", "tp"))
        style = ExpertTensorParallel(balance=balance, chunks=settings.chunks)
    else:
        mesh = init_device_mesh(platform, (groups, settings.tp), ("dp", "tp"))
        experts_mesh, style = mesh["tp"], TensorParallel()
    for experts in expert_modules(platform, model).values():
        style.apply(experts, experts_mesh)
    return Parallel(mesh)


def sharded_dimensions(sharding: Sharding | None) -> frozenset[str]:
    """Names of the mesh dimensions over which a parameter is cut into parts."""
    if sharding is None:
        return frozenset()
    names = sharding.mesh.mesh_dim_names or ()
    return frozenset(n for n, p in zip(names, sharding.placements, strict=True) if isinstance(p, Shard))
