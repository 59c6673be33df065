# SPDX-License-Identifier: Apache-2.0
"""Collectives: values, splits, dtypes, memory layouts. Payloads say where each row comes from, so equality is exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperep.conformance import oracle
from hyperep.conformance.bits import same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.platform.capabilities import Capability

PORT = "collectives"
_A2A = (Capability.ALL_TO_ALL,)
_GATHER = (Capability.ALL_GATHER,)
_SCATTER = (Capability.REDUCE_SCATTER,)
_REDUCE = (Capability.ALL_REDUCE,)
_BROADCAST = (Capability.BROADCAST,)


def _inputs(splits: np.ndarray, row_shape: Sequence[int] = (3,), dtype: Any = np.float32) -> list[np.ndarray]:
    return [oracle.encoded(r, int(n), row_shape).astype(dtype) for r, n in enumerate(splits.sum(axis=1))]


def _exchange(case: Case, splits: np.ndarray, row_shape: Sequence[int] = (3,), dtype: Any = np.float32) -> None:
    case.note(splits=splits.tolist(), row_shape=list(row_shape), dtype=np.dtype(dtype).name)
    inputs, me = _inputs(splits, row_shape, dtype), case.rank
    got = case.platform.all_to_all_single(case.tensor(inputs[me]), oracle.received(splits, me), oracle.sent(splits, me))
    case.equal(got, oracle.all_to_all(inputs, splits, me), "received rows")


def _uneven(case: Case) -> np.ndarray:
    # Each pair of ranks has a number of its own, and those of a pair differ between the two directions.
    return 1 + np.arange(case.ranks**2).reshape(case.ranks, case.ranks)


# ------------------------------------------------------------------------------------------------------ all-to-all
@requirement(
    "A2A-even",
    "all_to_all_single with equal splits delivers each rank's rows in rank order.",
    port=PORT,
    capabilities=_A2A,
    needs=("HOST-roundtrip", "WORLD-ranks"),
)
def a2a_even(case: Case) -> None:
    _exchange(case, np.full((case.ranks, case.ranks), 2))


@requirement(
    "A2A-no-splits",
    "Without splits the rows are divided evenly, for the outputs as for the inputs.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-even",),
)
def a2a_no_splits(case: Case) -> None:
    splits = np.full((case.ranks, case.ranks), 3)
    inputs = _inputs(splits)
    got = case.platform.all_to_all_single(case.tensor(inputs[case.rank]))
    case.equal(got, oracle.all_to_all(inputs, splits, case.rank), "received rows")


@requirement(
    "A2A-uneven-splits",
    "Splits may differ for each pair of ranks and direction.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-even",),
)
def a2a_uneven(case: Case) -> None:
    _exchange(case, _uneven(case))


@requirement(
    "A2A-zero-splits",
    "Some splits may be zero, one rank may send nothing and another one receive nothing.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-uneven-splits",),
)
def a2a_zero(case: Case) -> None:
    diagonal = np.diag(1 + np.arange(case.ranks))
    _exchange(case, diagonal)
    silent = _uneven(case)
    silent[0] = 0
    _exchange(case, silent)
    deaf = _uneven(case)
    deaf[:, -1] = 0
    _exchange(case, deaf)
    _exchange(case, np.roll(diagonal, 1, axis=1))


@requirement(
    "A2A-all-empty",
    "All splits may be zero; the result has zero rows and keeps the other dims and the dtype.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-even",),
)
def a2a_all_empty(case: Case) -> None:
    for row_shape in ((), (3,), (2, 2)):
        _exchange(case, np.zeros((case.ranks, case.ranks), np.int64), row_shape)


@requirement(
    "A2A-row-shapes",
    "Splits count rows of dim 0, whether rows are scalars, vectors or matrices.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-uneven-splits",),
)
def a2a_row_shapes(case: Case) -> None:
    for row_shape in ((), (1,), (5,), (2, 3)):
        _exchange(case, _uneven(case), row_shape)


@requirement(
    "A2A-integers", "int32 and int64 are exchanged exactly.", port=PORT, capabilities=_A2A, needs=("A2A-uneven-splits",)
)
def a2a_integers(case: Case) -> None:
    for dtype in (np.int32, np.int64):
        _exchange(case, _uneven(case), (2,), dtype)
    me = case.rank
    big = np.array([2**40 + 100 * me + r for r in range(case.ranks)])
    got = case.platform.all_to_all_single(case.tensor(big))
    case.equal(got, np.array([2**40 + 100 * r + me for r in range(case.ranks)]), "integers past 2**32")


def _a2a_dtype(name: str, capability: Capability) -> Requirement:
    def check(case: Case) -> None:
        splits, me = _uneven(case), case.rank
        inputs = [values(case, name, (n, 2), r) for r, n in enumerate(splits.sum(axis=1))]
        x = case.tensor(inputs[me], name)
        got = case.platform.all_to_all_single(x, oracle.received(splits, me), oracle.sent(splits, me))
        same_bits(case, got, oracle.all_to_all(inputs, splits, me), name, "received rows")

    return requirement(
        f"A2A-{name}",
        f"Where {capability.value} is declared, its rows are exchanged bit for bit.",
        port=PORT,
        level=Level.OPTIONAL,
        capabilities=(Capability.ALL_TO_ALL, capability),
        needs=("A2A-uneven-splits", f"DTYPE-{name}"),
    )(check)


A2A_DTYPES = (
    _a2a_dtype("bfloat16", Capability.BFLOAT16),
    _a2a_dtype("float16", Capability.FLOAT16),
    _a2a_dtype("float64", Capability.FLOAT64),
)


@requirement(
    "A2A-strided",
    "The input of all_to_all_single may be a transposed or sliced view.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-uneven-splits",),
)
def a2a_strided(case: Case) -> None:
    splits, me, xp = _uneven(case), case.rank, case.xp
    inputs = _inputs(splits, (4,))
    transposed = xp.permute_dims(case.tensor(inputs[me].T.copy()), (1, 0))
    sliced = case.tensor(np.concatenate([inputs[me], inputs[me]], axis=1))[:, :4]
    for name, x in (("transposed", transposed), ("sliced", sliced)):
        got = case.platform.all_to_all_single(x, oracle.received(splits, me), oracle.sent(splits, me))
        case.equal(got, oracle.all_to_all(inputs, splits, me), f"rows received for a {name} input")


@requirement(
    "A2A-new-tensor",
    "The input of all_to_all_single is left as it was, also in a world of one rank.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-even",),
)
def a2a_new_tensor(case: Case) -> None:
    x = oracle.encoded(case.rank, case.ranks, (2,)).astype(np.float32)
    sent = case.tensor(x)
    case.platform.all_to_all_single(sent)
    case.equal(sent, x, "the input, after the exchange")


@requirement(
    "A2A-not-recorded",
    "all_to_all_single is not recorded by autodiff: it passes no gradient on.",
    port=PORT,
    capabilities=(*_A2A, Capability.AUTODIFF),
    needs=("A2A-even", "VJP-unused"),
)
def a2a_not_recorded(case: Case) -> None:
    def function(x: Any) -> Any:
        return 2 * x + case.platform.all_to_all_single(x)

    x = case.normal((case.ranks, 2), case.rank)
    with case.counting("all_to_all_single") as calls:
        _, (gradient,) = case.gradients(function, [x], np.ones_like(x))
    case.equal(gradient, np.full_like(x, 2), "gradient")
    case.is_true(
        calls["all_to_all_single"] == 1, f"{calls['all_to_all_single']} exchanges were issued, 1 was asked for"
    )


@requirement(
    "A2A-wrong-splits",
    "Input splits that do not sum to the rows are an error before anything is sent.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-even",),
)
def a2a_wrong_splits(case: Case) -> None:
    x = case.tensor(np.ones((2 * case.ranks, 2), np.float32))
    for wrong in ([3] * case.ranks, [1] * case.ranks, [2] * (case.ranks + 1)):
        case.note(input_splits=wrong, rows=2 * case.ranks)
        case.raises(Exception, functools.partial(case.platform.all_to_all_single, x, wrong, wrong))
    _exchange(case, np.full((case.ranks, case.ranks), 1))  # and the ranks are still in step


@requirement(
    "A2A-splits-disagree",
    "Where a rank expects more rows than another one sends it, at least one rank raises: no row that nobody sent is "
    "handed out.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_A2A, Capability.ALL_GATHER),
    needs=("A2A-wrong-splits", "AG-values"),
    min_ranks=2,
)
def a2a_splits_disagree(case: Case) -> None:
    last, me = case.ranks - 1, case.rank
    sent, expected = np.full((case.ranks,) * 2, 2), np.full((case.ranks,) * 2, 2)
    for missing in (1, 2):
        sent[0, last] = 2 - missing
        case.note(sent=sent.tolist(), expected=expected.tolist())
        x = case.tensor(oracle.encoded(me, int(sent[me].sum()), (4,)).astype(np.float32))
        try:
            case.host(case.platform.all_to_all_single(x, oracle.received(expected, me), oracle.sent(sent, me)))
            raised = 0
        except Exception:
            raised = 1
        # All ranks learn of it, and go on together.
        everyone = case.host(case.platform.all_gather(case.tensor(np.array([raised]))))
        case.is_true(
            bool(everyone.any()), f"rank 0 sent rank {last} {missing} rows less than it expected: nobody raised"
        )


@requirement(
    "A2A-large",
    "An exchange of a few megabytes is delivered whole.",
    port=PORT,
    level=Level.STRESS,
    capabilities=_A2A,
    needs=("A2A-uneven-splits",),
)
def a2a_large(case: Case) -> None:
    rows = 2048
    own = np.arange(case.ranks * rows * 64, dtype=np.int32).reshape(-1, 64)
    got = case.host(case.platform.all_to_all_single(case.tensor(own + case.rank)))
    part = own[case.rank * rows : (case.rank + 1) * rows]
    want = np.concatenate([part + r for r in range(case.ranks)])
    case.equal(got, want, "received rows")


# ------------------------------------------------------------------------------------------------------------ async
_ASYNC = (Capability.ALL_TO_ALL, Capability.ASYNC_COLLECTIVES)


@requirement(
    "ASYNC-wait",
    "async_op=True returns work whose wait() returns the received rows.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_ASYNC,
    needs=("A2A-uneven-splits",),
)
def async_wait(case: Case) -> None:
    splits, me = _uneven(case), case.rank
    inputs = _inputs(splits)
    work = case.platform.all_to_all_single(
        case.tensor(inputs[me]), oracle.received(splits, me), oracle.sent(splits, me), async_op=True
    )
    case.is_true(not case.platform.is_tensor(work), "async_op=True returned a tensor, which cannot be waited for")
    case.equal(work.wait(), oracle.all_to_all(inputs, splits, me), "rows after wait()")


@requirement(
    "ASYNC-wait-twice",
    "wait() is idempotent: each call returns the same rows and communicates no more.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_ASYNC,
    needs=("ASYNC-wait",),
)
def async_wait_twice(case: Case) -> None:
    inputs = _inputs(np.full((case.ranks, case.ranks), 1))
    work = case.platform.all_to_all_single(case.tensor(inputs[case.rank]), async_op=True)
    want = np.concatenate([x[case.rank : case.rank + 1] for x in inputs])
    # One rank waits more often than the others, who must not be needed for it.
    for time in range(2 + (case.rank == 0)):
        case.equal(work.wait(), want, f"rows after wait() number {time + 1}")
    _exchange(case, _uneven(case))


@requirement(
    "ASYNC-two-in-flight",
    "Two exchanges may be under way, and be waited for in the other order.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_ASYNC,
    needs=("ASYNC-wait",),
)
def async_two(case: Case) -> None:
    me = case.rank
    first, second = (_inputs(s, (n,)) for s, n in ((np.full((case.ranks,) * 2, 2), 3), (_uneven(case), 2)))
    splits = _uneven(case)
    one = case.platform.all_to_all_single(case.tensor(first[me]), async_op=True)
    two = case.platform.all_to_all_single(
        case.tensor(second[me]), oracle.received(splits, me), oracle.sent(splits, me), async_op=True
    )
    case.equal(two.wait(), oracle.all_to_all(second, splits, me), "the second exchange")
    case.equal(one.wait(), oracle.all_to_all(first, np.full((case.ranks,) * 2, 2), me), "the first exchange")


@requirement(
    "ASYNC-input-kept",
    "The input of an exchange under way may be dropped by its sender before anybody waits.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_ASYNC,
    needs=("ASYNC-wait",),
)
def async_input_kept(case: Case) -> None:
    splits, me = np.full((case.ranks, case.ranks), 512), case.rank
    inputs = _inputs(splits, (8,))
    work = case.platform.all_to_all_single(case.tensor(inputs[me]), async_op=True)
    # Memory that was freed too early would be taken and overwritten by these.
    others = [case.xp.full(inputs[me].shape, -1.0, dtype=case.xp.float32) for _ in range(4)]
    case.equal(work.wait(), oracle.all_to_all(inputs, splits, me), "received rows")
    del others


# ------------------------------------------------------------------------------------------------ other collectives
@requirement(
    "AG-values",
    "all_gather concatenates the tensors of all ranks along dim 0 in rank order, for rows of any shape.",
    port=PORT,
    capabilities=_GATHER,
    needs=("HOST-roundtrip",),
)
def gather_values(case: Case) -> None:
    for row_shape in ((), (3,), (2, 2)):
        for dtype in (np.float32, np.int32, np.int64):
            parts = [oracle.encoded(r, 2, row_shape).astype(dtype) for r in range(case.ranks)]
            case.equal(case.platform.all_gather(case.tensor(parts[case.rank])), np.concatenate(parts), "gathered rows")


@requirement(
    "AG-edges",
    "all_gather takes zero rows and transposed views.",
    port=PORT,
    capabilities=_GATHER,
    needs=("AG-values",),
)
def gather_edges(case: Case) -> None:
    case.equal(
        case.platform.all_gather(case.tensor(np.zeros((0, 3), np.float32))), np.zeros((0, 3), np.float32), "no rows"
    )
    parts = [oracle.encoded(r, 3, (2,)).astype(np.float32) for r in range(case.ranks)]
    view = case.xp.permute_dims(case.tensor(parts[case.rank].T.copy()), (1, 0))
    case.equal(case.platform.all_gather(view), np.concatenate(parts), "rows of a transposed view")


@requirement(
    "RS-values",
    "reduce_scatter sums over ranks and leaves each rank its own equal part of the rows.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_SCATTER,
    needs=("HOST-roundtrip",),
)
def scatter_values(case: Case) -> None:
    for row_shape in ((), (3,), (2, 2)):
        for dtype in (np.float32, np.int64):
            terms = [(oracle.encoded(r, 2 * case.ranks, row_shape) * (r + 1)).astype(dtype) for r in range(case.ranks)]
            want = np.sum(terms, axis=0)[2 * case.rank : 2 * case.rank + 2]
            case.equal(case.platform.reduce_scatter(case.tensor(terms[case.rank])), want, "this rank's rows")


@requirement(
    "RS-edges",
    "reduce_scatter takes zero rows and transposed views.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_SCATTER,
    needs=("RS-values",),
)
def scatter_edges(case: Case) -> None:
    none = np.zeros((0, 3), np.float32)
    case.equal(case.platform.reduce_scatter(case.tensor(none)), none, "no rows")
    terms = [oracle.encoded(r, case.ranks, (2,)).astype(np.float32) for r in range(case.ranks)]
    view = case.xp.permute_dims(case.tensor(terms[case.rank].T.copy()), (1, 0))
    case.equal(
        case.platform.reduce_scatter(view),
        np.sum(terms, axis=0)[case.rank : case.rank + 1],
        "rows of a transposed view",
    )


@requirement(
    "AR-sum",
    "all_reduce sums over ranks, the same on each of them, for rows of any shape and floats as integers.",
    port=PORT,
    capabilities=_REDUCE,
    needs=("HOST-roundtrip",),
)
def reduce_sum(case: Case) -> None:
    for shape in ((1,), (4, 3), (2, 2, 2)):
        for dtype in (np.float32, np.int32, np.int64):
            terms = [(np.arange(math.prod(shape)).reshape(shape) + 7 * r).astype(dtype) for r in range(case.ranks)]
            case.equal(case.platform.all_reduce(case.tensor(terms[case.rank])), sum(terms), "sum over the ranks")


@requirement("AR-max-min", "all_reduce knows max and min.", port=PORT, capabilities=_REDUCE, needs=("AR-sum",))
def reduce_max_min(case: Case) -> None:
    terms = [case.normal((3, 2), r) for r in range(case.ranks)]
    for dtype in (np.float32, np.int64):
        given = [(100 * t).astype(dtype) for t in terms]
        x = case.tensor(given[case.rank])
        case.equal(case.platform.all_reduce(x, op="max"), np.max(given, axis=0), "max over the ranks")
        case.equal(case.platform.all_reduce(x, op="min"), np.min(given, axis=0), "min over the ranks")


@requirement(
    "AR-edges",
    "all_reduce takes zero rows, transposed views and tensors without dims, and refuses an unknown operation.",
    port=PORT,
    capabilities=_REDUCE,
    needs=("AR-sum",),
)
def reduce_edges(case: Case) -> None:
    none = np.zeros((0, 3), np.float32)
    case.equal(case.platform.all_reduce(case.tensor(none)), none, "no rows")
    terms = [case.normal((3, 2), r).round(1) for r in range(case.ranks)]
    view = case.xp.permute_dims(case.tensor(terms[case.rank].T.copy()), (1, 0))
    case.close(case.platform.all_reduce(view), sum(terms), "sum of transposed views")
    scalar = case.xp.sum(case.tensor(terms[case.rank]))
    case.close(case.platform.all_reduce(scalar), np.sum(terms), "sum of tensors without dims")
    case.raises(Exception, lambda: case.platform.all_reduce(view, op="median"))


@requirement(
    "AR-new-tensor",
    "all_reduce and broadcast return a new tensor and leave their input as it was.",
    port=PORT,
    capabilities=(*_REDUCE, *_BROADCAST),
    needs=("AR-sum", "BC-values"),
)
def reduce_new_tensor(case: Case) -> None:
    own = np.full((2, 3), case.rank + 1, np.float32)
    x = case.tensor(own)
    summed = case.platform.all_reduce(x)
    case.equal(x, own, "the input, after all_reduce")
    case.platform.broadcast(x, case.ranks - 1)
    case.equal(x, own, "the input, after broadcast")
    case.equal(summed, np.full((2, 3), case.ranks * (case.ranks + 1) / 2, np.float32), "the sum")


@requirement(
    "AR-same-bits",
    "all_reduce of floats gives bit for bit the same result on every rank.",
    port=PORT,
    capabilities=(*_REDUCE, *_GATHER),
    needs=("AR-sum", "AG-values"),
    min_ranks=2,
)
def reduce_same_bits(case: Case) -> None:
    # Terms of very different size: another order of additions would round differently.
    x = case.normal((64,), case.rank) * np.float32(10.0) ** case.rng(case.rank, 1).integers(-6, 6, 64).astype(
        np.float32
    )
    summed = case.host(case.platform.all_reduce(case.tensor(x)))
    everyone = case.host(case.platform.all_gather(case.tensor(summed[None])))
    for rank in range(case.ranks):
        case.equal(everyone[rank], summed, f"the sum on rank {rank} against this rank's")


@requirement(
    "BC-values",
    "broadcast gives every rank the tensor of the source, whichever rank that is.",
    port=PORT,
    capabilities=_BROADCAST,
    needs=("HOST-roundtrip",),
)
def broadcast_values(case: Case) -> None:
    for source in range(case.ranks):
        for dtype in (np.float32, np.int64):
            own = oracle.encoded(case.rank, 2, (3,)).astype(dtype)
            want = oracle.encoded(source, 2, (3,)).astype(dtype)
            case.note(source=source)
            case.equal(case.platform.broadcast(case.tensor(own), source), want, "the source's tensor")


@requirement(
    "BC-edges",
    "broadcast takes zero rows and transposed views.",
    port=PORT,
    capabilities=_BROADCAST,
    needs=("BC-values",),
)
def broadcast_edges(case: Case) -> None:
    none = np.zeros((0, 3), np.float32)
    case.equal(case.platform.broadcast(case.tensor(none)), none, "no rows")
    parts = [oracle.encoded(r, 3, (2,)).astype(np.float32) for r in range(case.ranks)]
    view = case.xp.permute_dims(case.tensor(parts[case.rank].T.copy()), (1, 0))
    case.equal(case.platform.broadcast(view, case.ranks - 1), parts[-1], "rows of a transposed view")
