# SPDX-License-Identifier: Apache-2.0
"""Gradients of collectives: the exchange reversed, and the pair of tensor parallelism."""

from __future__ import annotations

from typing import Any

import numpy as np

from hyperep.conformance import oracle
from hyperep.conformance.bits import same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability

PORT = "gradients of collectives"
_A2A = (Capability.ALL_TO_ALL, Capability.AUTODIFF)
_REDUCE = (Capability.ALL_REDUCE, Capability.AUTODIFF)


def _data(case: Case, splits: np.ndarray, dim: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and cotangents of all ranks."""
    inputs = [case.normal((n, dim), 1, r) for r, n in enumerate(splits.sum(axis=1))]
    cotangents = [case.normal((n, dim), 2, r) for r, n in enumerate(splits.sum(axis=0))]
    return inputs, cotangents


def _exchange(case: Case, x: Any, splits: np.ndarray) -> Any:
    return case.platform.differentiable_all_to_all_single(
        x, oracle.sent(splits, case.rank), oracle.received(splits, case.rank)
    )


def _agree(case: Case, splits: np.ndarray) -> None:
    case.note(splits=splits.tolist())
    inputs, cotangents = _data(case, splits)
    me = case.rank
    out, (gradient,) = case.gradients(lambda x: _exchange(case, x, splits), [inputs[me]], cotangents[me])
    case.equal(out, oracle.all_to_all(inputs, splits, me), "received rows")
    case.equal(gradient, oracle.all_to_all(cotangents, splits.T, me), "gradient")


def _uneven(case: Case) -> np.ndarray:
    return 1 + np.arange(case.ranks**2).reshape(case.ranks, case.ranks)


@requirement(
    "A2A-grad",
    "The backward of differentiable_all_to_all_single is the exchange of the cotangent with the splits exchanged.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-uneven-splits", "CUSTOM-gradients"),
)
def a2a_gradient(case: Case) -> None:
    _agree(case, _uneven(case))


@requirement(
    "A2A-grad-zero-rows",
    "A rank that receives or sends no row still takes part in backward, and its gradient has zero rows.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-grad", "A2A-zero-splits"),
)
def a2a_gradient_zero_rows(case: Case) -> None:
    deaf, silent = _uneven(case), _uneven(case)
    deaf[:, -1] = 0
    silent[0] = 0
    for splits in (deaf, silent, np.zeros_like(deaf)):
        _agree(case, splits)


@requirement(
    "A2A-grad-strided-cotangent",
    "Cotangents of an exchange may be expanded (from a sum) or transposed.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-grad",),
)
def a2a_gradient_strided(case: Case) -> None:
    splits, me, xp = _uneven(case), case.rank, case.xp
    inputs, cotangents = _data(case, splits)
    _, (gradient,) = case.gradients(
        lambda x: xp.permute_dims(_exchange(case, x, splits), (1, 0)), [inputs[me]], cotangents[me].T.copy()
    )
    case.equal(gradient, oracle.all_to_all(cotangents, splits.T, me), "gradient of a transposed result")
    weights = [np.full((), r + 2, np.float32) for r in range(case.ranks)]
    _, (gradient,) = case.gradients(lambda x: xp.sum(_exchange(case, x, splits)), [inputs[me]], weights[me])
    ones = [np.full_like(c, w) for c, w in zip(cotangents, weights, strict=True)]
    case.equal(gradient, oracle.all_to_all(ones, splits.T, me), "gradient of a sum")


@requirement(
    "A2A-grad-twice",
    "Rows that are exchanged twice sum both gradients, and a way there and back is the identity.",
    port=PORT,
    capabilities=_A2A,
    needs=("A2A-grad",),
)
def a2a_gradient_twice(case: Case) -> None:
    splits, me = _uneven(case), case.rank
    inputs, cotangents = _data(case, splits)

    def twice(x: Any) -> Any:
        return _exchange(case, x, splits) + 2 * _exchange(case, x, splits)

    _, (gradient,) = case.gradients(twice, [inputs[me]], cotangents[me])
    case.close(gradient, 3 * oracle.all_to_all(cotangents, splits.T, me), "gradient of two exchanges")

    def there_and_back(x: Any) -> Any:
        return _exchange(case, _exchange(case, x, splits), splits.T)

    g = case.normal(inputs[me].shape, 3, me)
    out, (gradient,) = case.gradients(there_and_back, [inputs[me]], g)
    case.equal(out, inputs[me], "rows that went there and back")
    case.equal(gradient, g, "their gradient")


@requirement(
    "A2A-grad-bfloat16",
    "The gradient of an exchange of bfloat16 rows is bfloat16, and exact.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(*_A2A, Capability.BFLOAT16),
    needs=("A2A-grad", "A2A-bfloat16"),
)
def a2a_gradient_bfloat16(case: Case) -> None:
    splits, me = _uneven(case), case.rank
    sent = [values(case, "bfloat16", (n, 2), 1, r) for r, n in enumerate(splits.sum(axis=1))]
    back = [values(case, "bfloat16", (n, 2), 2, r) for r, n in enumerate(splits.sum(axis=0))]
    x, g = case.tensor(sent[me], "bfloat16"), case.tensor(back[me], "bfloat16")
    out, pullback = case.platform.vjp(lambda x: _exchange(case, x, splits), x)
    (gradient,) = pullback(g)
    for what, tensor, want in (
        ("output", out, oracle.all_to_all(sent, splits, me)),
        ("gradient", gradient, oracle.all_to_all(back, splits.T, me)),
    ):
        same_bits(case, tensor, want, "bfloat16", what)


@requirement(
    "COPY-grad",
    "copy_to_group is the identity, and its backward sums the cotangents of the group's ranks.",
    port=PORT,
    capabilities=_REDUCE,
    needs=("AR-sum", "CUSTOM-gradients"),
)
def copy_gradient(case: Case) -> None:
    x = case.normal((3, 2), 1)
    cotangents = [case.normal((3, 2), 2, r) for r in range(case.ranks)]
    out, (gradient,) = case.gradients(lambda x: case.platform.copy_to_group(x), [x], cotangents[case.rank])
    case.equal(out, x, "output")
    case.close(gradient, sum(cotangents), "gradient")


@requirement(
    "REDUCE-grad",
    "reduce_from_group sums over the group's ranks, and its backward is the identity.",
    port=PORT,
    capabilities=_REDUCE,
    needs=("AR-sum", "CUSTOM-gradients"),
)
def reduce_gradient(case: Case) -> None:
    terms = [case.normal((3, 2), 1, r) for r in range(case.ranks)]
    g = case.normal((3, 2), 2, case.rank)
    out, (gradient,) = case.gradients(lambda x: case.platform.reduce_from_group(x), [terms[case.rank]], g)
    case.close(out, sum(terms), "output")
    case.equal(gradient, g, "gradient")


@requirement(
    "TP-pair-edges",
    "The tensor-parallel pair takes zero rows, transposed inputs and expanded cotangents.",
    port=PORT,
    capabilities=_REDUCE,
    needs=("COPY-grad", "REDUCE-grad"),
)
def pair_edges(case: Case) -> None:
    platform, xp = case.platform, case.xp
    none = np.zeros((0, 2), np.float32)
    for member in (platform.copy_to_group, platform.reduce_from_group):
        out, (gradient,) = case.gradients(member, [none], none)
        case.equal(out, none, "output of zero rows")
        case.equal(gradient, none, "gradient of zero rows")
    terms = [case.normal((2, 3), 1, r) for r in range(case.ranks)]
    weight = np.array(case.rank + 1, np.float32)

    def function(member: Any, x: Any) -> Any:
        return xp.sum(member(xp.permute_dims(x, (1, 0))))

    _, (gradient,) = case.gradients(lambda x: function(platform.copy_to_group, x), [terms[case.rank]], weight)
    total = case.ranks * (case.ranks + 1) / 2
    case.equal(gradient, np.full((2, 3), total, np.float32), "gradient of copy_to_group")
    out, (gradient,) = case.gradients(lambda x: function(platform.reduce_from_group, x), [terms[case.rank]], weight)
    case.close(out, np.asarray(np.sum(terms)), "sum of reduce_from_group")
    case.equal(gradient, np.full((2, 3), weight, np.float32), "gradient of reduce_from_group")
