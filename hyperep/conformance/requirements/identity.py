# SPDX-License-Identifier: Apache-2.0
"""What a platform says about itself, and about its place in the world."""

from __future__ import annotations

import time

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.validate import validate_platform

PORT = "identity and world"
_ORDER = (Support.UNSUPPORTED, Support.EMULATED, Support.FULL)


@requirement("WORLD-starts", "Ranks start, and each of them gets its platform.", port=PORT)
def starts(case: Case) -> None:
    case.is_true(case.platform is not None, "there is no platform")


@requirement("ID-surface", "Every member of the protocol is there and can be called as the core calls it.", port=PORT)
def surface(case: Case) -> None:
    faults = validate_platform(case.platform)
    case.is_true(not faults, "\n".join(str(fault) for fault in faults))


@requirement(
    "ID-capabilities",
    "The platform declares capabilities with the core's own names, and none better than its plugin's spec says.",
    port=PORT,
)
def capabilities(case: Case) -> None:
    for capability, support in case.platform.capabilities.items():
        case.is_true(isinstance(capability, Capability), f"{capability!r} is not a Capability")
        case.is_true(isinstance(support, Support), f"{capability.value}: {support!r} is not a Support")
        best = Support(case.declared.get(capability.value, "unsupported"))
        case.is_true(
            _ORDER.index(support) <= _ORDER.index(best),
            f"{capability.value} is {support.value} on the platform but {best.value} in its spec",
        )


@requirement(
    "ID-is-tensor",
    "is_tensor is true for the platform's tensors, and false for lists, numbers and None.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def is_tensor(case: Case) -> None:
    for shape in ((3,), (0, 2), ()):
        tensor = case.tensor(np.zeros(shape, np.float32))
        case.is_true(case.platform.is_tensor(tensor) is True, f"a tensor of shape {shape} is not recognised")
    for other in (None, 3, [1.0, 2.0], "tensor", case.platform):
        case.is_true(case.platform.is_tensor(other) is False, f"{other!r:.40} is taken for a tensor")


@requirement(
    "WORLD-ranks",
    "world_size is the number of ranks launched, and every rank below it exists once.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def ranks(case: Case) -> None:
    size, rank = case.platform.world_size, case.platform.rank
    case.is_true(size == case.ranks, f"world_size is {size}, but {case.ranks} ranks were launched")
    case.is_true(isinstance(rank, int) and 0 <= rank < size, f"rank {rank!r} is not an int below {size}")
    everyone = case.host(case.platform.all_gather(case.tensor(np.array([rank], np.int64))))
    case.equal(everyone, np.arange(size), "the ranks of the world")


@requirement(
    "WORLD-barrier",
    "barrier returns on no rank before every rank has entered it.",
    port=PORT,
    needs=("WORLD-ranks",),
    min_ranks=2,
)
def barrier(case: Case) -> None:
    for late in range(case.ranks):
        if case.rank == late:
            time.sleep(0.1)
        # The clock is one for all processes of a machine.
        entered = time.monotonic_ns()
        case.platform.barrier()
        left = time.monotonic_ns()
        times = case.host(case.platform.all_gather(case.tensor(np.array([[entered, left]], np.int64))))
        case.is_true(
            times[:, 1].min() >= times[:, 0].max(),
            f"rank {times[:, 1].argmin()} left the barrier {times[:, 0].max() - times[:, 1].min()} ns before rank "
            f"{times[:, 0].argmax()} came",
        )


@requirement(
    "WORLD-barrier-group",
    "barrier of a group waits for the members of that group only.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(Capability.SUBGROUPS,),
    needs=("WORLD-barrier", "AR-sum"),
    min_ranks=2,
)
def barrier_group(case: Case) -> None:
    # The first half enters its barrier before, and the others theirs after, a reduction that needs all ranks: a barrier
    # that waits for the world would wait for ever, or take part in the reduction of the others.
    middle = case.ranks // 2
    groups = [case.platform.new_group(list(ranks)) for ranks in (range(middle), range(middle, case.ranks))]
    for first in (True, False):
        own = groups[case.rank >= middle]
        early = (case.rank < middle) == first
        if early:
            case.platform.barrier(own)
        total = case.platform.all_reduce(case.tensor(np.array([10 + case.rank], np.int32)))
        case.equal(
            total, np.array([10 * case.ranks + sum(range(case.ranks))], np.int32), "the sum between the barriers"
        )
        if not early:
            case.platform.barrier(own)
