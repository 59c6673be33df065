# SPDX-License-Identifier: Apache-2.0
"""Groups of ranks, and the lines of two-dimensional meshes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability

PORT = "groups"
_GROUPS = (Capability.SUBGROUPS,)


@requirement(
    "GROUP-world",
    "A group of all ranks works like the world.",
    port=PORT,
    capabilities=(Capability.ALL_REDUCE,),
    needs=("AR-sum",),
)
def world(case: Case) -> None:
    group = case.platform.new_group(list(range(case.ranks)))
    got = case.platform.all_reduce(case.tensor(np.array([case.rank + 1])), group)
    case.equal(got, np.array([case.ranks * (case.ranks + 1) // 2]), "sum over the group")


@requirement(
    "GROUP-single",
    "A group of one rank: every collective returns that rank's own.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_GROUPS,
    needs=("GROUP-world", "A2A-even", "AG-values", "BC-values"),
)
def single(case: Case) -> None:
    platform = case.platform
    groups = [platform.new_group([r]) for r in range(case.ranks)]
    own, x = groups[case.rank], oracle.encoded(case.rank, 3, (2,)).astype(np.float32)
    for name, got in (
        ("all_reduce", platform.all_reduce(case.tensor(x), own)),
        ("all_gather", platform.all_gather(case.tensor(x), own)),
        ("broadcast", platform.broadcast(case.tensor(x), 0, own)),
        ("all_to_all_single", platform.all_to_all_single(case.tensor(x), [3], [3], own)),
    ):
        case.equal(got, x, name)


def _halves(case: Case) -> tuple[list[list[int]], list[int]]:
    """Two groups that take turns, and the members of this rank's."""
    halves = [[r for r in range(case.ranks) if r % 2 == h] for h in (0, 1)]
    return halves, halves[case.rank % 2]


@requirement(
    "GROUP-subgroup",
    "Collectives of a sub-group involve its members only; every rank makes the group, members or not.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_GROUPS,
    needs=("GROUP-world", "AG-values"),
    min_ranks=2,
)
def subgroup(case: Case) -> None:
    halves, members = _halves(case)
    groups = [case.platform.new_group(half) for half in halves]
    group = groups[case.rank % 2]
    case.note(groups=halves)
    x = case.tensor(np.array([case.rank + 1]))
    case.equal(case.platform.all_reduce(x, group), np.array([sum(members) + len(members)]), "sum over the group")
    case.equal(case.platform.all_gather(x, group), np.array(members) + 1, "gathered from the group")


@requirement(
    "GROUP-a2a",
    "all_to_all_single of a sub-group counts splits by rank in the group, uneven and zero ones included.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.ALL_TO_ALL),
    needs=("GROUP-subgroup", "A2A-zero-splits"),
    min_ranks=2,
)
def subgroup_a2a(case: Case) -> None:
    halves, members = _halves(case)
    group = [case.platform.new_group(half) for half in halves][case.rank % 2]
    size, me = len(members), members.index(case.rank)
    splits = np.arange(size * size).reshape(size, size)  # the first one is zero
    case.note(groups=halves, splits=splits.tolist())
    inputs = [
        oracle.encoded(r, int(n), (2,)).astype(np.float32) for r, n in zip(members, splits.sum(axis=1), strict=True)
    ]
    got = case.platform.all_to_all_single(
        case.tensor(inputs[me]), oracle.received(splits, me), oracle.sent(splits, me), group
    )
    case.equal(got, oracle.all_to_all(inputs, splits, me), "received rows")


@requirement(
    "GROUP-broadcast-source",
    "The source of a broadcast is a rank in the group, not in the world.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.BROADCAST),
    needs=("GROUP-subgroup", "BC-values"),
    min_ranks=2,
)
def broadcast_source(case: Case) -> None:
    halves, members = _halves(case)
    group = [case.platform.new_group(half) for half in halves][case.rank % 2]
    case.note(groups=halves)
    for source, rank in enumerate(members):
        got = case.platform.broadcast(case.tensor(np.array([case.rank])), source, group)
        case.equal(got, np.array([rank]), f"the tensor of the group's rank {source}")


@requirement(
    "GROUP-twice",
    "Two groups of the same ranks, all or some of them, are independent: each has its own order of collectives.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.ASYNC_COLLECTIVES, Capability.ALL_TO_ALL),
    needs=("GROUP-world", "ASYNC-two-in-flight"),
)
def twice(case: Case) -> None:
    for members, (one, two) in twins(case):
        me = members.index(case.rank)

        def start(group: Any, offset: int, size: int = len(members), me: int = me) -> Any:
            x = np.arange(size) + 10 * me + offset
            return case.platform.all_to_all_single(case.tensor(x), group=group, async_op=True)

        works = [start(group, 1000 * n) for n, group in enumerate((one, two, one, two))]
        want = 10 * np.arange(len(members)) + me
        # Within a group in order, and the groups in turn.
        for number in (1, 0, 3, 2):
            group = "second" if number % 2 else "first"
            case.equal(works[number].wait(), want + 1000 * number, f"exchange {number // 2} of the {group} group")
        case.platform.barrier(two)
        got = case.platform.all_reduce(case.tensor(np.array([me + 1])), two)
        case.equal(got, np.array([len(members) * (len(members) + 1) // 2]), "sum over the second group")


def twins(case: Case) -> Iterator[tuple[list[int], list[Any]]]:
    """Two groups of all ranks; from three ranks on, two of every second one too: their members, and the two groups."""
    everyone = list(range(case.ranks))
    for parts in [[everyone], *([[everyone[::2], everyone[1::2]]] if case.ranks > 2 else [])]:
        case.note(groups=parts)
        made = [[case.platform.new_group(part) for part in parts] for _ in range(2)]
        mine = next(n for n, part in enumerate(parts) if case.rank in part)
        yield parts[mine], [groups[mine] for groups in made]


@requirement(
    "GROUP-gradients",
    "Gradients of collectives of a sub-group stay within it.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.AUTODIFF),
    needs=("GROUP-subgroup", "COPY-grad", "REDUCE-grad", "A2A-grad"),
    min_ranks=2,
)
def gradients(case: Case) -> None:
    halves, members = _halves(case)
    group = [case.platform.new_group(half) for half in halves][case.rank % 2]
    case.note(groups=halves)
    cotangents = {r: case.normal((len(members), 2), 1, r) for r in members}
    x, g = case.normal((len(members), 2), 2, case.rank), cotangents[case.rank]
    _, (gradient,) = case.gradients(lambda x: case.platform.copy_to_group(x, group), [x], g)
    case.close(gradient, sum(cotangents.values()), "gradient of copy_to_group")
    _, (gradient,) = case.gradients(lambda x: case.platform.reduce_from_group(x, group), [x], g)
    case.equal(gradient, g, "gradient of reduce_from_group")
    ones = [1] * len(members)
    me = members.index(case.rank)
    _, (gradient,) = case.gradients(
        lambda x: case.platform.differentiable_all_to_all_single(x, ones, ones, group), [x], g
    )
    case.equal(gradient, np.stack([cotangents[r][me] for r in members]), "gradient of the exchange")


def _shapes(ranks: int) -> list[tuple[int, int]]:
    return [(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0]


@requirement(
    "MESH-lines",
    "On a two-dimensional mesh the group of each dimension is this rank's line along it, for every shape.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_GROUPS,
    needs=("GROUP-world", "AG-values"),
)
def mesh_lines(case: Case) -> None:
    for shape in _shapes(case.ranks):
        case.note(shape=shape)
        mesh = hyperep.init_device_mesh(case.platform, shape, ("ep", "tp"))
        grid = np.arange(case.ranks).reshape(shape)
        row, column = mesh.get_local_rank("ep"), mesh.get_local_rank("tp")
        case.is_true(int(grid[row, column]) == case.rank, f"rank {case.rank} stands at {(row, column)} of {shape}")
        own = case.tensor(np.array([case.rank]))
        for name, line in (("ep", grid[:, column]), ("tp", grid[row])):
            case.equal(case.platform.all_gather(own, mesh.get_group(name)), line, f"the ranks along {name!r}")
            case.equal(case.platform.all_gather(own, mesh[name].get_group()), line, f"the ranks of mesh[{name!r}]")


@requirement(
    "MESH-smaller-than-world",
    "Every rank helps to make a mesh of fewer ranks; those outside have no coordinate, and their groups are not used.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_GROUPS,
    needs=("GROUP-subgroup",),
    min_ranks=2,
)
def smaller_mesh(case: Case) -> None:
    inside = case.ranks - 1
    mesh = hyperep.init_device_mesh(case.platform, (inside,), ("ep",))
    if case.rank < inside:
        got = case.platform.all_gather(case.tensor(np.array([case.rank])), mesh.get_group())
        case.equal(got, np.arange(inside), "the ranks of the mesh")
    else:
        case.is_true(mesh.get_coordinate() is None, f"rank {case.rank} has a coordinate in a mesh of {inside} ranks")
        case.raises(ValueError, mesh.get_group)
    case.platform.barrier()
