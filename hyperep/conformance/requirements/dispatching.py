# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine on the platform: layout, cost, and errors that every rank hears of."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.bits import same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.conformance.routings import ROUTINGS, splits
from hyperep.platform.capabilities import Capability

PORT = "dispatch"
_ROUTE = (Capability.ALL_TO_ALL, Capability.PERMUTE_ROWS)
_ROUTE_GRAD = (*_ROUTE, Capability.AUTODIFF)
_DIM = 3


def _mesh(case: Case) -> Any:
    return case.mesh((case.ranks,), ("ep",))


def _counts(case: Case, routing: str, experts_per_rank: int = 3) -> np.ndarray:
    make, _ = ROUTINGS[routing]
    counts = make(case.rng(77), case.ranks, experts_per_rank * case.ranks)
    case.note(routing=routing, tokens_per_expert=counts.tolist())
    return counts


def _rows(case: Case, counts: np.ndarray) -> list[np.ndarray]:
    return [case.normal((n, _DIM), 1, r) for r, n in enumerate(counts.sum(axis=1))]


def _expert_major(case: Case, counts: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """The rows of this rank's experts: by expert, and within one by source rank."""
    local = counts.shape[1] // case.ranks
    starts = np.cumsum(counts, axis=1) - counts
    runs = [
        rows[r][starts[r, e] : starts[r, e] + counts[r, e]]
        for e in range(case.rank * local, (case.rank + 1) * local)
        for r in range(case.ranks)
    ]
    return np.concatenate(runs)


@requirement(
    "DISPATCH-layout",
    "Dispatched rows are this rank's experts', by expert and within one by source rank, with an int64 count for each.",
    port=PORT,
    capabilities=_ROUTE,
    needs=("A2A-zero-splits", "PERM-values", "A2A-integers", "XP-concat", "XP-broadcast-to", "XP-sum"),
)
def layout(case: Case) -> None:
    for routing in ROUTINGS:
        counts = _counts(case, routing)
        rows = _rows(case, counts)
        got, tokens, context = hyperep.dispatch(
            case.tensor(rows[case.rank]), case.tensor(counts[case.rank]), _mesh(case)
        )
        want = counts.reshape(case.ranks, case.ranks, -1)[:, case.rank].sum(axis=0)
        case.equal(got, _expert_major(case, counts, rows), "rows of this rank's experts")
        case.equal(tokens, want, "their counts")
        case.is_true(context.input_splits == tuple(oracle.sent(splits(counts), case.rank)), "context.input_splits")
        case.is_true(
            context.output_splits == tuple(oracle.received(splits(counts), case.rank)), "context.output_splits"
        )


@requirement(
    "DISPATCH-roundtrip",
    "combine brings every row back to its place, and both have their gradients, under every routing.",
    port=PORT,
    capabilities=_ROUTE_GRAD,
    needs=("DISPATCH-layout", "A2A-grad-zero-rows", "PERM-grad"),
)
def roundtrip(case: Case) -> None:
    for routing in ROUTINGS:
        counts = _counts(case, routing)
        x, g = _rows(case, counts)[case.rank], case.normal((counts[case.rank].sum(), _DIM), 2, case.rank)
        tokens, mesh = case.tensor(counts[case.rank]), _mesh(case)

        def there_and_back(x: Any, tokens: Any = tokens, mesh: Any = mesh) -> Any:
            rows, _, context = hyperep.dispatch(x, tokens, mesh)
            return hyperep.combine(3 * rows, context)

        out, (gradient,) = case.gradients(there_and_back, [x], g)
        case.equal(out, 3 * x, "rows that went there and back")
        case.equal(gradient, 3 * g, "their gradient")


@requirement(
    "DISPATCH-int32-counts",
    "Counts may be int32, and rows may have several dims.",
    port=PORT,
    capabilities=_ROUTE,
    needs=("DISPATCH-layout",),
)
def int32_counts(case: Case) -> None:
    counts = _counts(case, "random")
    x = case.normal((counts[case.rank].sum(), 2, 2), 1, case.rank)
    rows, tokens, context = hyperep.dispatch(
        case.tensor(x), case.tensor(counts[case.rank].astype(np.int32)), _mesh(case)
    )
    case.is_true(tokens.dtype == case.xp.int64, f"the counts came back as {tokens.dtype}")
    case.equal(hyperep.combine(rows, context), x, "rows that went there and back")


@requirement(
    "DISPATCH-bfloat16",
    "Rows in bfloat16 stay bfloat16, bit for bit.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_ROUTE, Capability.BFLOAT16),
    needs=("DISPATCH-layout", "A2A-bfloat16"),
)
def bfloat16(case: Case) -> None:
    counts = _counts(case, "random")
    x = values(case, "bfloat16", (int(counts[case.rank].sum()), _DIM), case.rank)
    rows, _, context = hyperep.dispatch(case.tensor(x, "bfloat16"), case.tensor(counts[case.rank]), _mesh(case))
    back = hyperep.combine(rows, context)
    same_bits(case, back, x, "bfloat16", "rows that went there and back")


@requirement(
    "DISPATCH-cost",
    "A dispatch makes one host copy and exchanges rows once, a combine once more; it and backward make no host copy.",
    port=PORT,
    capabilities=_ROUTE_GRAD,
    needs=("DISPATCH-roundtrip",),
)
def cost(case: Case) -> None:
    counts = _counts(case, "random")
    x, tokens, mesh = _rows(case, counts)[case.rank], case.tensor(counts[case.rank]), _mesh(case)
    rows = case.tensor(x)
    seen: dict[str, dict[str, int]] = {}

    def forward(x: Any) -> Any:
        with case.counting("to_host", "differentiable_all_to_all_single") as seen["dispatch"]:
            rows, _, context = hyperep.dispatch(x, tokens, mesh)
        with case.counting("to_host", "differentiable_all_to_all_single") as seen["combine"]:
            return hyperep.combine(rows, context)

    _, pullback = case.platform.vjp(forward, rows)
    cotangent = case.tensor(x)
    with case.counting("to_host") as seen["backward"]:
        pullback(cotangent)
    for part, copies, exchanges in (("dispatch", 1, 1), ("combine", 0, 1), ("backward", 0, None)):
        got = seen[part]["to_host"]
        case.is_true(got == copies, f"{part} made {got} host copies, must be {copies}")
        if exchanges is not None:
            got = seen[part]["differentiable_all_to_all_single"]
            case.is_true(got == exchanges, f"{part} exchanged rows {got} times, must be {exchanges}")


@requirement(
    "DISPATCH-interleaved",
    "Dispatches may interleave: each combine uses its own context, in any order.",
    port=PORT,
    capabilities=_ROUTE,
    needs=("DISPATCH-layout",),
)
def interleaved(case: Case) -> None:
    mesh = _mesh(case)
    names = ("random", "hot-rank", "empty-rank")
    counts = [_counts(case, name) for name in names]
    given = [case.normal((c[case.rank].sum(), _DIM), 1, n, case.rank) for n, c in enumerate(counts)]
    sent = [
        hyperep.dispatch(case.tensor(x), case.tensor(c[case.rank]), mesh) for x, c in zip(given, counts, strict=True)
    ]
    for number in (1, 2, 0):
        rows, _, context = sent[number]
        case.equal(hyperep.combine(rows, context), given[number], f"rows of the dispatch with routing {names[number]}")


def _fault(name: str, demand: str, kind: type[Exception], words: tuple[str, ...], spoil: Any) -> Requirement:
    def check(case: Case) -> None:
        mesh, experts = _mesh(case), 2 * case.ranks
        for guilty in range(case.ranks):
            case.note(guilty=guilty)
            x, counts = np.ones((experts, _DIM), np.float32), np.ones(experts, np.int64)
            rows, tokens = case.tensor(x), case.tensor(counts)
            if case.rank == guilty:
                rows, tokens = spoil(case, x, counts)
            attempt = functools.partial(hyperep.dispatch, rows, tokens, mesh, num_experts=experts)
            case.raises(kind, attempt, f"rank {guilty}", *words)
            # The ranks are still in step.
            rows, _, context = hyperep.dispatch(case.tensor(x), case.tensor(counts), mesh, num_experts=experts)
            case.equal(hyperep.combine(rows, context), x, "rows of the dispatch after the error")

    return requirement(
        f"FAULT-{name}",
        f"{demand} on one rank raises the same error, which names that rank, on every rank.",
        port=PORT,
        capabilities=_ROUTE,
        needs=("DISPATCH-layout",),
    )(check)


def _one_row_too_many(case: Case, x: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    return case.tensor(np.concatenate([x, x[:1]])), case.tensor(counts)


def _negative(case: Case, x: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    return case.tensor(x), case.tensor(np.concatenate([[-1, 3], counts[2:]]))


def _one_count_too_many(case: Case, x: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    return case.tensor(x), case.tensor(np.concatenate([counts, [0]]))


def _float_counts(case: Case, x: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    return case.tensor(x), case.tensor(counts.astype(np.float32))


def _list_counts(case: Case, x: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    return case.tensor(x), counts.tolist()


FAULTS = (
    _fault("counts-sum", "Counts that do not sum to the rows", ValueError, ("sum",), _one_row_too_many),
    _fault("counts-negative", "A negative count", ValueError, ("negative",), _negative),
    _fault("counts-length", "Counts of the wrong length", ValueError, ("num_experts",), _one_count_too_many),
    _fault("counts-float", "Counts that are not integers", TypeError, ("int64",), _float_counts),
    _fault("foreign-tensor", "Counts that are no tensor of the platform", TypeError, ("tensor",), _list_counts),
)


@requirement(
    "FAULT-experts-indivisible",
    "A number of experts that does not divide by the ranks is an error on every rank.",
    port=PORT,
    capabilities=_ROUTE,
    needs=("DISPATCH-layout",),
    min_ranks=2,
)
def indivisible(case: Case) -> None:
    experts = case.ranks + 1
    x, counts = case.tensor(np.ones((experts, _DIM), np.float32)), case.tensor(np.ones(experts, np.int64))
    case.raises(ValueError, lambda: hyperep.dispatch(x, counts, _mesh(case)), f"num_experts={experts}", "divisible")


@requirement(
    "FAULT-combine-rows",
    "combine refuses another number of rows than was dispatched.",
    port=PORT,
    capabilities=_ROUTE,
    needs=("DISPATCH-layout",),
)
def combine_rows(case: Case) -> None:
    counts = np.ones(2 * case.ranks, np.int64)
    x = case.tensor(np.ones((2 * case.ranks, _DIM), np.float32))
    rows, _, context = hyperep.dispatch(x, case.tensor(counts), _mesh(case))
    case.raises(ValueError, lambda: hyperep.combine(rows[1:], context), "combine")
    case.raises(ValueError, lambda: hyperep.combine(case.xp.concat([rows, rows], axis=0), context), "combine")
    case.equal(hyperep.combine(rows, context), np.ones((2 * case.ranks, _DIM), np.float32), "rows after the error")
