# SPDX-License-Identifier: Apache-2.0
"""Buffers of experts: which of them are split among the ranks, and which stay whole.

A module of experts reads its buffers by the number of the expert, as it reads its weights. One that has an entry for
each expert (a scale, a mask) must be split with them, or the experts of every rank but the first read others' entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from hyperep.distribute import is_laid_out, lay_out, own_buffers
from hyperep.mesh import DeviceMesh
from hyperep.placements import Placement, Replicate, Shard
from hyperep.platform.protocol import Module
from hyperep.sharding import Sharding, whole_shape

__all__ = ["plan_buffers", "shard_buffers"]

Declared = Mapping[str, Placement | Sequence[Placement]]
"""Placements that somebody has said, by the path of a buffer (or a pattern as of a shell)."""


def plan_buffers(
    style: str,
    module: Module,
    mesh: DeviceMesh,
    declared: Declared,
    *,
    experts: int | None = None,
    levels: int = 0,
    sliced: frozenset[int] = frozenset(),
) -> dict[str, tuple[Placement, ...]]:
    """How each buffer of *module* that is split lies over *mesh*, by path; checked before anything is changed.

    A buffer of ``[E, ...]`` is split as the experts are, if ``E`` is no other size in the module; one in which the
    number ``E`` does not occur stays whole. Everything else must be declared.

    Args:
        style: as the errors name it.
        module: the experts.
        mesh: the mesh of the style.
        declared: what its user has said.
        experts: ``E``, if mesh dimensions split experts.
        levels: how many do, from the first one on.
        sliced: sizes that the last mesh dimension cuts.

    Raises:
        ValueError: whether a buffer is split cannot be seen and was not said, or what was said names no buffer, does
            not divide, or has another number of placements; or one is distributed already in another way.
    """
    platform = mesh.platform
    buffers = platform.buffers(module)
    features = {size for p in platform.parameters(module).values() for size in whole_shape(platform, p)[1:]}
    unused = [pattern for pattern in declared if not any(fnmatchcase(path, pattern) for path in buffers)]
    if unused:
        raise ValueError(f"{style}: buffers={unused} match no buffer; the module has {sorted(buffers)}")
    plan = {}
    for path, buffer in buffers.items():
        shape, there = whole_shape(platform, buffer), platform.sharding(buffer)
        said = next((value for pattern, value in declared.items() if fnmatchcase(path, pattern)), None)
        if said is not None:
            placements = (said,) if isinstance(said, Placement) else tuple(said)
        elif there is not None:
            placements = there.placements  # which says it
        else:
            placements = _seen(style, path, shape, mesh, experts, levels, features, sliced)
        Sharding(mesh, placements).local_shape(shape)
        if there is not None and not is_laid_out(platform, buffer, mesh, placements):
            raise ValueError(
                f"{style}: buffer {path!r} is distributed already, as {list(there.placements)} over {there.mesh}, and "
                f"not as {list(placements)} over {mesh}; leave it whole, or lay it out so"
            )
        if any(not isinstance(placement, Replicate) for placement in placements):
            plan[path] = placements
    return plan


def shard_buffers(module: Module, mesh: DeviceMesh, plan: Mapping[str, Sequence[Placement]]) -> None:
    """Split the buffers of *module* as planned. Collective over the mesh."""
    for path, part in mesh.platform.named_modules(module).items():
        for name in list(own_buffers(mesh.platform, part)):
            placements = plan.get(f"{path}.{name}" if path else name)
            if placements is not None:
                lay_out(part, name, mesh, placements)


def _seen(
    style: str,
    path: str,
    shape: tuple[int, ...],
    mesh: DeviceMesh,
    experts: int | None,
    levels: int,
    features: set[int],
    sliced: frozenset[int],
) -> tuple[Placement, ...]:
    """The placements that can be seen from the shape alone."""
    whole: list[Placement] = [Replicate()] * mesh.ndim
    of_experts = experts is not None and experts > 1 and experts in shape
    cut = set(shape[1:] if of_experts and shape[0] == experts else shape) & sliced
    if cut:
        raise _undecided(style, path, shape, mesh, f"{sorted(cut)[0]}, the size that tensor parallelism splits")
    if not of_experts:
        return tuple(whole)
    if shape[0] != experts or experts in (*shape[1:], *features):
        raise _undecided(style, path, shape, mesh, f"{experts}, the number of experts")
    return (*[Shard(0)] * levels, *whole[levels:])


def _undecided(style: str, path: str, shape: tuple[int, ...], mesh: DeviceMesh, size: str) -> ValueError:
    others = "" if mesh.ndim == 1 else ", with one placement for each dimension of the mesh,"
    return ValueError(
        f"{style}: it cannot be seen whether buffer {path!r} of shape {shape} is split, which has a dim of {size}; say "
        f"buffers={{{path!r}: Shard(dim)}} or buffers={{{path!r}: Replicate()}}{others} where the style is made"
    )
