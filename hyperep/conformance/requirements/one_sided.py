# SPDX-License-Identifier: Apache-2.0
"""Ranks of which one has nothing to learn: cotangents of zeros there, or gradients that nobody wants.

Every exchange of backward is issued all the same. A rank that leaves one out makes the others wait, or take what was
meant for the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import requirement
from hyperep.moe import GroupedExperts
from hyperep.platform.capabilities import Capability

_A2A = (Capability.ALL_TO_ALL, Capability.AUTODIFF)
_REDUCE = (Capability.ALL_REDUCE, Capability.AUTODIFF)
_EXPERTS = (
    *(Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL),
    *(Capability.PERMUTE_ROWS, Capability.ALL_TO_ALL, Capability.AUTODIFF),
)
_TOLERANCE = 1e-4
_NAMES = ("w1", "w2", "w3")


def _idle(case: Case) -> list[set[int]]:
    """Which ranks have cotangents of zeros: each in turn, all but one, all."""
    everyone = set(range(case.ranks))
    return [*({rank} for rank in range(case.ranks)), everyone - {0}, everyone]


def _zeroed(cotangents: list[np.ndarray], idle: set[int]) -> list[np.ndarray]:
    return [np.zeros_like(g) if rank in idle else g for rank, g in enumerate(cotangents)]


@requirement(
    "A2A-grad-zero-cotangent",
    "A cotangent of zeros on some ranks is exchanged as any other: the gradients of all ranks are whole.",
    port="gradients of collectives",
    capabilities=_A2A,
    needs=("A2A-grad",),
    min_ranks=2,
)
def exchange(case: Case) -> None:
    splits, me = 1 + np.arange(case.ranks**2).reshape(case.ranks, case.ranks) % 4, case.rank
    there, back = oracle.sent(splits, me), oracle.received(splits, me)
    x = case.normal((int(splits[me].sum()), 2), 1, me)
    every = [case.normal((int(n), 2), 2, r) for r, n in enumerate(splits.sum(axis=0))]
    for idle in _idle(case):
        case.note(idle=idle)
        cotangents = _zeroed(every, idle)
        _, (gradient,) = case.gradients(
            lambda x: case.platform.differentiable_all_to_all_single(x, there, back), [x], cotangents[me]
        )
        case.equal(gradient, oracle.all_to_all(cotangents, splits.T, me), "gradient")


@requirement(
    "TP-pair-zero-cotangent",
    "A cotangent of zeros on some ranks is reduced as any other by the tensor-parallel pair.",
    port="gradients of collectives",
    capabilities=_REDUCE,
    needs=("COPY-grad", "REDUCE-grad"),
    min_ranks=2,
)
def pair(case: Case) -> None:
    platform, x = case.platform, case.normal((3, 2), 1, case.rank)
    every = [case.normal((3, 2), 2, r) for r in range(case.ranks)]
    for idle in _idle(case):
        case.note(idle=idle)
        cotangents = _zeroed(every, idle)
        g = cotangents[case.rank]
        _, (gradient,) = case.gradients(lambda x: platform.copy_to_group(x), [x], g)
        case.close(gradient, np.sum(cotangents, axis=0), "gradient of copy_to_group")
        _, (gradient,) = case.gradients(lambda x: platform.reduce_from_group(x), [x], g)
        case.equal(gradient, g, "gradient of reduce_from_group")
        _, (gradient,) = case.gradients(lambda x: platform.reduce_from_group(2 * platform.copy_to_group(x)), [x], g)
        case.close(gradient, 2 * np.sum(cotangents, axis=0), "gradient of both")


@requirement(
    "CUSTOM-one-sided",
    "A custom backward is called on every rank whose function has an input that wants a gradient, also where its "
    "cotangent is zero or another input wants none: collectives in it are issued everywhere.",
    port="gradients of collectives",
    capabilities=(*_A2A, Capability.ALL_GATHER),
    needs=("A2A-grad", "CUSTOM-needed", "AG-values"),
    min_ranks=2,
)
def custom(case: Case) -> None:
    platform, xp, me = case.platform, case.xp, case.rank

    def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[Any, ...]:
        # One exchange for both gradients, whichever is wanted here.
        both = platform.all_to_all_single(xp.concat([cotangents[0], 2 * cotangents[0]], axis=1))  # [R, 4]
        return both[:, :2] if needed[0] else None, both[:, 2:] if needed[1] else None

    add = platform.custom_vjp(lambda x, y: (x + y, ()), backward)
    x, y = (case.normal((case.ranks, 2), n, me) for n in range(2))
    every = [case.normal((case.ranks, 2), 2, r) for r in range(case.ranks)]
    fixed_x, fixed_y = case.tensor(x), case.tensor(y)
    ways: tuple[tuple[Callable[..., Any], list[np.ndarray], list[int]], ...] = (
        (lambda x, y: add(x, y), [x, y], [1, 2]),
        (lambda x: add(x, fixed_y), [x], [1]),
        (lambda y: add(fixed_x, y), [y], [2]),
    )
    for shift in range(len(ways)):
        function, primals, factors = ways[(me + shift) % len(ways)]
        for idle in (set(), {0}, {case.ranks - 1}):
            case.note(wanted=factors, idle=idle)
            cotangents = _zeroed(every, idle)
            _, gradients = case.gradients(function, primals, cotangents[me])
            want = np.stack([g[me] for g in cotangents])
            for gradient, factor in zip(gradients, factors, strict=True):
                case.close(gradient, factor * want, f"gradient of input {factor}")


def _experts(case: Case, style: Any, name: str) -> tuple[Any, list[np.ndarray], int]:
    """Sharded experts, and the whole weights that their shards are parts of."""
    platform, hidden = case.platform, case.divisible(8)
    count = 2 * case.ranks
    module = GroupedExperts(platform, 5, hidden, count)
    shapes = ((count, hidden, 5), (count, 5, hidden), (count, hidden, 5))
    weights = [case.normal(shape, 10, n) / 2 for n, shape in enumerate(shapes)]
    case.assign(module, dict(zip(_NAMES, weights, strict=True)))
    style.apply(module, case.mesh((case.ranks,), (name,)))
    return module, weights, count


@requirement(
    "EP-zero-cotangent",
    "Experts under ExpertParallel have whole gradients where the cotangents of some ranks are zero.",
    port="styles",
    capabilities=_EXPERTS,
    needs=("EP-random",),
    min_ranks=2,
)
def experts(case: Case) -> None:
    _experts_agree(case, [(idle, _NAMES, True) for idle in _idle(case)])


@requirement(
    "EP-gradients-not-asked",
    "Each rank may ask for the gradients of other experts' weights, or of none: those that it asks for are whole, and "
    "the others are not missed.",
    port="styles",
    capabilities=_EXPERTS,
    needs=("EP-random",),
)
def not_asked(case: Case) -> None:
    asked = [_NAMES, ("w2",), (), ("w3", "w1")]
    _experts_agree(case, [(set(), asked[(case.rank + shift) % len(asked)], True) for shift in range(len(asked))])


def _experts_agree(case: Case, runs: list[tuple[set[int], tuple[str, ...], bool]]) -> None:
    platform, me = case.platform, case.rank
    module, (w1, w2, w3), count = _experts(case, hyperep.ExpertParallel(), "ep")
    handles = platform.parameters(module)
    counts = case.rng(77).integers(0, 4, size=(case.ranks, count))
    rows, every = ([case.normal((int(n), 5), k, r) for r, n in enumerate(counts.sum(axis=1))] for k in (1, 2))
    tokens = case.tensor(counts[me])
    for idle, asked, _ in runs:
        case.note(idle=idle, asked=asked)
        cotangents = _zeroed(every, idle)
        out, (gx, *gw) = case.gradients(
            lambda x: module(x, tokens), [rows[me]], cotangents[me], [handles[name] for name in asked]
        )
        found = [
            oracle.experts_gradients(x, w1, w2, w3, sizes, g)
            for x, sizes, g in zip(rows, counts.tolist(), cotangents, strict=True)
        ]
        case.close(out, oracle.experts(rows[me], w1, w2, w3, counts[me].tolist()), "output", _TOLERANCE)
        case.close(gx, found[me][0], "gradient of the rows", _TOLERANCE)
        for name, gradient in zip(asked, gw, strict=True):
            total = np.sum([of_rank[1 + _NAMES.index(name)] for of_rank in found], axis=0)
            part = platform.sharding(handles[name]).local_slices(total.shape)
            case.close(gradient, total[part], f"gradient of this rank's part of {name}", _TOLERANCE)
