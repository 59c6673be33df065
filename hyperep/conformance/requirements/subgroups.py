# SPDX-License-Identifier: Apache-2.0
"""Collectives and their gradients in groups whose ranks are not their positions; barriers; groups of the same ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from hyperep.conformance import oracle
from hyperep.conformance.bits import dtypes, same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.conformance.requirements.groups import twins
from hyperep.platform.capabilities import Capability

PORT = "groups"
_GROUPS = (Capability.SUBGROUPS,)


def _layouts(case: Case) -> Iterator[tuple[list[int], int, Any]]:
    """Ways to divide the world: the members of this rank's group, its position, and the group.

    In each of them there are groups that do not begin with rank 0, or leave ranks out, so that no position is a rank.
    """
    last = case.ranks - 1
    ways = (
        [list(range(0, case.ranks, 2)), list(range(1, case.ranks, 2))],
        [[0], list(range(1, case.ranks))],
        [[0, last], list(range(1, last))],
    )
    seen: list[list[list[int]]] = []
    for way in ways:
        parts = [part for part in way if part]
        if parts in seen or len(parts) < 2:
            continue
        seen.append(parts)
        case.note(groups=parts)
        groups = [case.platform.new_group(part) for part in parts]
        mine = next(n for n, part in enumerate(parts) if case.rank in part)
        yield parts[mine], parts[mine].index(case.rank), groups[mine]


def _uneven(size: int) -> np.ndarray:
    return np.arange(size * size).reshape(size, size) % 4  # the first one is zero


@requirement(
    "GROUP-collectives",
    "Every collective of a sub-group counts ranks, rows and sources by position in it, involves nobody else, and keeps "
    "every bit in every dtype that the platform has.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.ALL_TO_ALL, Capability.ALL_GATHER, Capability.ALL_REDUCE, Capability.BROADCAST),
    needs=("GROUP-subgroup", "GROUP-a2a", "GROUP-broadcast-source", "AR-bits", "BC-bits", "AG-bits", "A2A-bits"),
    min_ranks=2,
)
def collectives(case: Case) -> None:
    platform = case.platform
    for members, me, group in _layouts(case):
        size = len(members)
        # No rank has the largest or the smallest of all, so that one too many in a group shows.
        terms = {r: case.rng(1, r).integers(-1000, 1000, size=(2 * size, 3)).astype(np.float32) for r in members}
        of_group = [terms[r] for r in members]
        x, total = case.tensor(terms[case.rank]), np.sum(of_group, axis=0)
        case.equal(platform.all_gather(x, group), np.concatenate(of_group), "gathered from the group")
        case.equal(platform.all_reduce(x, group), total, "sum over the group")
        case.equal(platform.all_reduce(x, group, "max"), np.max(of_group, axis=0), "max over the group")
        case.equal(platform.all_reduce(x, group, "min"), np.min(of_group, axis=0), "min over the group")
        if case.supports(Capability.REDUCE_SCATTER):
            case.equal(platform.reduce_scatter(x, group), total[2 * me : 2 * me + 2], "this rank's sums")
        for source, term in enumerate(of_group):
            case.equal(platform.broadcast(x, source, group), term, f"the tensor of the group's rank {source}")
        even = np.full((size, size), 2)
        case.equal(
            platform.all_to_all_single(x, group=group),
            oracle.all_to_all(of_group, even, me),
            "rows of an even exchange",
        )
        splits = _uneven(size)
        inputs = [case.rng(2, r).normal(size=(int(n), 2)) for r, n in zip(members, splits.sum(axis=1), strict=True)]
        given = case.tensor(inputs[me].astype(np.float32))
        want = oracle.all_to_all([a.astype(np.float32) for a in inputs], splits, me)
        there, back = oracle.sent(splits, me), oracle.received(splits, me)
        case.equal(platform.all_to_all_single(given, back, there, group), want, "rows of an uneven exchange")
        if case.supports(Capability.ASYNC_COLLECTIVES):
            first = platform.all_to_all_single(given, back, there, group, async_op=True)
            second = platform.all_to_all_single(x, group=group, async_op=True)
            case.equal(second.wait(), oracle.all_to_all(of_group, even, me), "rows of the second exchange under way")
            case.equal(first.wait(), want, "rows of the first exchange under way")
        for dtype in dtypes(case):
            case.note(groups=members, dtype=dtype)
            _keeps_bits(case, members, me, group, dtype)


def _keeps_bits(case: Case, members: list[int], me: int, group: Any, dtype: str) -> None:
    platform, size = case.platform, len(members)
    terms = [values(case, dtype, (2 * size, 3), r) for r in members]
    x = case.tensor(terms[me], dtype)
    exchanged = oracle.all_to_all(terms, np.full((size, size), 2), me)
    same_bits(case, platform.all_to_all_single(x, group=group), exchanged, dtype, "rows of an exchange")
    same_bits(case, platform.all_gather(x, group), np.concatenate(terms), dtype, "gathered from the group")
    same_bits(case, platform.broadcast(x, size - 1, group), terms[-1], dtype, "the tensor of the group's last rank")
    same_bits(case, platform.all_reduce(x, group, "max"), np.max(terms, axis=0), dtype, "max over the group")
    # One term of each sum is not zero, so that the sum is exact.
    owner = case.rng(5).integers(0, size, size=(2 * size, 3))
    alone = [np.where(owner == n, term, 0).astype(term.dtype) for n, term in enumerate(terms)]
    total = np.sum(alone, axis=0, dtype=alone[0].dtype)
    same_bits(case, platform.all_reduce(case.tensor(alone[me], dtype), group), total, dtype, "sum over the group")
    if case.supports(Capability.REDUCE_SCATTER):
        got = platform.reduce_scatter(case.tensor(alone[me], dtype), group)
        same_bits(case, got, total[2 * me : 2 * me + 2], dtype, "this rank's sums")


@requirement(
    "GROUP-every-gradient",
    "The backwards of collectives of a sub-group, uneven exchanges among them, stay within it and count by position.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.ALL_TO_ALL, Capability.ALL_REDUCE, Capability.AUTODIFF),
    needs=("GROUP-collectives", "GROUP-gradients", "A2A-grad-zero-rows"),
    min_ranks=2,
)
def gradients(case: Case) -> None:
    platform = case.platform
    for members, me, group in _layouts(case):
        terms, cotangents = ({r: case.normal((3, 2), n, r) for r in members} for n in (1, 2))
        x, g = terms[case.rank], cotangents[case.rank]
        out, (gradient,) = case.gradients(lambda x, of=group: platform.copy_to_group(x, of), [x], g)
        case.equal(out, x, "output of copy_to_group")
        case.close(gradient, sum(cotangents.values()), "gradient of copy_to_group")
        out, (gradient,) = case.gradients(lambda x, of=group: platform.reduce_from_group(x, of), [x], g)
        case.close(out, sum(terms.values()), "output of reduce_from_group")
        case.equal(gradient, g, "gradient of reduce_from_group")
        splits = _uneven(len(members))
        there, back = oracle.sent(splits, me), oracle.received(splits, me)
        inputs = [case.normal((int(n), 2), 3, r) for r, n in zip(members, splits.sum(axis=1), strict=True)]
        returned = [case.normal((int(n), 2), 4, r) for r, n in zip(members, splits.sum(axis=0), strict=True)]
        out, (gradient,) = case.gradients(
            lambda x, of=group, t=there, b=back: platform.differentiable_all_to_all_single(x, t, b, of),
            [inputs[me]],
            returned[me],
        )
        case.equal(out, oracle.all_to_all(inputs, splits, me), "rows of the exchange")
        case.equal(gradient, oracle.all_to_all(returned, splits.T, me), "their gradient")


@requirement(
    "GROUP-barrier",
    "barrier of a group returns on none of its members before all of them have entered it.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.ALL_GATHER),
    needs=("WORLD-barrier-group", "GROUP-subgroup"),
    min_ranks=3,
)
def barrier(case: Case) -> None:
    for members, me, group in _layouts(case):
        for late in (0, len(members) - 1):
            if me == late:
                time.sleep(0.05)
            entered = time.monotonic_ns()  # one clock for all processes of a machine
            case.platform.barrier(group)
            left = time.monotonic_ns()
            times = case.host(case.platform.all_gather(case.tensor(np.array([[entered, left]], np.int64)), group))
            case.is_true(
                times[:, 1].min() >= times[:, 0].max(),
                f"rank {members[times[:, 1].argmin()]} left the barrier of {members} before rank "
                f"{members[times[:, 0].argmax()]} came",
            )


@requirement(
    "GROUP-own-order",
    "Two groups of the same ranks, all or some of them, have each its own order of collectives: ranks may issue those "
    "of one before, and others after, those of the other.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_GROUPS, Capability.THREADS, Capability.ASYNC_COLLECTIVES, Capability.ALL_TO_ALL),
    needs=("GROUP-twice",),
    min_ranks=2,
    refusable=False,
)
def own_order(case: Case) -> None:
    def given(number: int, member: int, size: int) -> np.ndarray:
        return np.arange(size) + 10 * member + 1000 * number

    for members, groups in twins(case):
        size, me = len(members), members.index(case.rank)
        for turn in range(2):
            works = {
                n: case.platform.all_to_all_single(case.tensor(given(n, me, size)), group=groups[n], async_op=True)
                for n in ((0, 1) if me % 2 else (1, 0))
            }
            for n in (0, 1):
                want = np.array([given(n, member, size)[me] for member in range(size)])
                case.equal(works[n].wait(), want, f"turn {turn}: the exchange of group {n}")
