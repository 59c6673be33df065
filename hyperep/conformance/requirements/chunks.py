# SPDX-License-Identifier: Apache-2.0
"""Layers whose tokens travel in chunks: the same results, and exchanges under way while a rank computes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.conformance.requirements.token_styles import EP, ETP, LEVELS, Problem, ep_mesh, shapes
from hyperep.platform.capabilities import Capability, Support

PORT = "styles"
_ASYNC = (Capability.ALL_TO_ALL, Capability.ASYNC_COLLECTIVES, Capability.ALL_GATHER)


@requirement(
    "ASYNC-progress",
    "An exchange goes on while a rank computes, and calls nothing of the platform's communication; where "
    "async_collectives is EMULATED it need not.",
    port="collectives",
    level=Level.OPTIONAL,
    capabilities=_ASYNC,
    needs=("ASYNC-two-in-flight",),
    min_ranks=2,
)
def async_progress(case: Case) -> None:
    if case.platform.capabilities[Capability.ASYNC_COLLECTIVES] is Support.EMULATED:
        return
    # More than sockets hold, so that nothing arrives before its sender sends it all.
    splits, me = np.full((case.ranks, case.ranks), 512), case.rank
    rows = [case.normal((512 * case.ranks, 512), r) for r in range(case.ranks)]
    # How long an exchange takes nobody knows who shares the machine with others: if need be it is given longer.
    for seconds in (0.2, 1.0, 4.0):
        case.note(computes_meanwhile=me == 0, seconds=seconds)
        work = case.platform.all_to_all_single(case.tensor(rows[me]), async_op=True)
        if me == 0:
            _compute(case, seconds)
            ended = time.monotonic_ns()  # one clock for all processes of a machine
        got = work.wait()
        case.equal(got, oracle.all_to_all(rows, splits, me), "received rows")
        if me != 0:
            ended = time.monotonic_ns()
        ends = case.host(case.platform.all_gather(case.tensor(np.array([ended]))))
        if (ends[1:] < ends[0]).all():
            return
    late = [rank for rank in range(1, case.ranks) if ends[rank] >= ends[0]]
    case.is_true(
        False,
        f"rank 0 computed for {seconds:g} s, and its rows were not with ranks {late} before it waited for the "
        "exchange; declare async_collectives EMULATED if an exchange goes on in calls of the platform alone",
    )


def _compute(case: Case, seconds: float) -> None:
    """Products of matrices, and no communication."""
    x, end = case.tensor(case.normal((64, 64), 9)), time.monotonic() + seconds
    while time.monotonic() < end:
        case.host(case.xp.matmul(x, x))


@requirement(
    "EP-chunks",
    "ExpertParallel in 2 and 3 chunks equals the unsharded experts in output and all gradients, whatever the choices; "
    "a chunk may be without tokens.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*EP, Capability.ASYNC_COLLECTIVES),
    needs=("EP-tokens", "VJP-in-custom-forward", "ASYNC-two-in-flight"),
)
def chunks(case: Case) -> None:
    mesh = ep_mesh(case)
    for number, choices in ((2, "random"), (3, "duplicates"), (2, "nobody"), (3, "empty-rank"), (2, "all-empty")):
        case.note(chunks=number)
        problem = Problem(case, choices, case.ranks)
        problem.agree(problem.sharded(hyperep.ExpertParallel(chunks=number), mesh), case.rank)


@requirement(
    "EP-chunks-grids",
    "So does it with two levels, of which it hides the first, and so does ExpertTensorParallel.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*ETP, *LEVELS, Capability.ASYNC_COLLECTIVES),
    needs=("EP-chunks", "EP-levels", "ETP-tokens"),
    min_ranks=4,
)
def chunks_in_grids(case: Case) -> None:
    shape = next(shape for shape in shapes(case.ranks) if min(shape) > 1) if case.ranks % 2 == 0 else (case.ranks, 1)
    case.note(mesh=shape)
    levels = case.mesh(shape, ("node", "ep"))
    problem = Problem(case, "duplicates", case.ranks)
    problem.agree(problem.sharded(hyperep.ExpertParallel(levels=("node", "ep"), chunks=3), levels), case.rank)
    sliced = case.mesh(shape, ("ep", "tp"))
    problem = Problem(case, "empty-rank", shape[0])
    problem.agree(problem.sharded(hyperep.ExpertTensorParallel(chunks=2), sliced), sliced.get_local_rank("ep"))


@requirement(
    "EP-chunks-cost",
    "In chunks one host copy tells all counts, none is made in backward, and while a chunk is computed, in forward and "
    "in backward, another one is on its way; never more than two.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*EP, Capability.ASYNC_COLLECTIVES),
    needs=("EP-chunks",),
    min_ranks=2,
)
def chunks_cost(case: Case) -> None:
    platform, number = case.platform, 3
    problem = Problem(case, "random", case.ranks)
    flight = _Flight()
    experts = _watched_experts(case, problem.experts, flight)
    hyperep.ExpertParallel(chunks=number).apply(experts, ep_mesh(case))
    rank, original = case.rank, platform.all_to_all_single

    def exchange(
        x: Any, output_splits: Any = None, input_splits: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        work = original(x, output_splits, input_splits, group, async_op)
        return flight.began(work) if async_op else work

    numbers = case.tensor(problem.indices[rank])
    inputs = (case.tensor(problem.tokens[rank]), case.tensor(problem.scores[rank]))
    platform.all_to_all_single = exchange
    try:
        with case.counting("to_host") as forward:
            _, pullback = platform.vjp(lambda x, s: experts(x, numbers, s), *inputs)
        with case.counting("to_host") as backward:
            pullback(case.tensor(problem.cotangents[rank]))
    finally:
        del platform.all_to_all_single
    case.is_true(forward["to_host"] == 1, f"forward made {forward['to_host']} host copies; one tells all chunks")
    case.is_true(backward["to_host"] == 0, f"backward made {backward['to_host']} host copies")
    case.is_true(flight.now == 0, f"{flight.now} exchanges were never waited for")
    for name, seen in (("forward", flight.forward), ("backward", flight.backward)):
        case.note(**{f"in_flight_in_{name}": seen})
        case.is_true(
            len(seen) >= number and min(seen) > 0, f"{name}: nothing was on its way while a chunk was computed"
        )
        # Two exchanges for each of two chunks: of tokens, and of what belongs to their choices.
        case.is_true(max(seen) <= 4, f"{name}: {max(seen)} exchanges were on their way at a time")


class _Flight:
    """How many exchanges are issued and not waited for; and were, whenever experts computed."""

    def __init__(self) -> None:
        self.now = 0
        self.forward: list[int] = []
        self.backward: list[int] = []

    def began(self, work: Any) -> Any:
        """Work that tells when it was waited for."""
        self.now += 1
        return _Counted(self, work)


class _Counted:
    def __init__(self, flight: _Flight, work: Any) -> None:
        self.flight, self.work = flight, work

    def wait(self) -> Any:
        self.flight.now -= 1
        return self.work.wait()


def _watched_experts(case: Case, number: int, flight: _Flight) -> Any:
    """Experts that note what is on its way, in forward and in backward, and ask nothing of the host."""
    platform, xp = case.platform, case.xp

    def noted(x: Any) -> Any:
        def forward(x: Any) -> tuple[Any, tuple[Any, ...]]:
            flight.forward.append(flight.now)
            return x + 0, ()

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
            flight.backward.append(flight.now)
            return (cotangents[0],)

        return platform.custom_vjp(forward, backward)(x)

    def experts(m: Any, x: Any, numbers: Any, scores: Any) -> Any:
        return noted(x) * xp.sum(scores, axis=1, keepdims=True) * xp.sum(m.scale)

    module = platform.make_module("WatchedExperts", {"scale": case.tensor(np.ones((number, 1), np.float32))}, experts)
    module.takes = "tokens"
    return module
