# SPDX-License-Identifier: Apache-2.0
"""What is examined: short programs of calls, each with batches whose routing is chosen.

An examination is data. The ranks carry its actions out on the layer (``on_rank.py``), and this process carries the same
actions out on the reference (``expectation.py``), so that what is expected needs no formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hyperep.audit.claims import Claims
from hyperep.audit.inputs import choices_from_counts
from hyperep.conformance.routings import ROUTINGS

__all__ = ["EXAMINATIONS", "Action", "Batches", "Examination", "batches_of", "examinations"]

Action = tuple[str, ...]
"""A verb of :mod:`hyperep.audit.on_rank` and its objects."""
Batches = dict[str, tuple[np.ndarray, ...]]
"""Batch -> the choices ``[T, K]`` of each rank's tokens."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One program."""

    name: str
    what: str
    """What is special about it, as the end of "only ...", such as "where an expert gets no token"."""
    actions: tuple[Action, ...]
    routings: dict[str, str] = field(default_factory=lambda: {"a": "mixed"})
    """Batch -> how it is routed."""
    layers: int = 1
    plain: bool = False
    """Whether nothing is special: a fault seen here needs no condition."""
    smallest_ranks: int = 1
    repeat: bool = False
    """Whether to run it a second time and compare bits."""


def _pass(batch: str) -> tuple[Action, ...]:
    """Forward and backward of one batch."""
    return ("forward", batch), ("backward", batch)


def _gradients(label: str) -> tuple[Action, ...]:
    """What lies between the last backward and the optimizer, and the gradients then."""
    return ("finish",), ("gradients", label)


_STEP = (*_pass("a"), *_gradients("a"))
_NEXT_STEP = (("zero",), *_pass("b"), *_gradients("b"))


def _routed(name: str, what: str, *, plain: bool = False, smallest_ranks: int = 1) -> Examination:
    return Examination(
        name=name, what=what, actions=_STEP, routings={"a": name}, plain=plain, smallest_ranks=smallest_ranks
    )


def _kept(batch: str) -> tuple[Action, ...]:
    return *_pass(batch), ("finish",), ("zero",), ("drop",)


_TWO = {"a": "mixed", "b": "balanced"}

EXAMINATIONS: tuple[Examination, ...] = (
    _routed("one-row", "where there is one token in all"),
    _routed("balanced", "where every expert is as busy", plain=True),
    _routed("random", "where tokens are spread at random"),
    Examination(
        name="mixed",
        what="where experts are differently busy",
        actions=_STEP,
        plain=True,
        repeat=True,
    ),
    _routed("empty-expert", "where an expert gets no token"),
    _routed("empty-rank", "where a rank has no token and its experts get none", smallest_ranks=2),
    _routed("hot-expert", "where most tokens go to one expert"),
    _routed("hot-rank", "where all tokens go to the experts of one rank", smallest_ranks=2),
    _routed("all-empty", "where there is no token at all"),
    _routed("unequal", "where ranks have different numbers of tokens", smallest_ranks=2),
    _routed("duplicates", "where tokens are equal to one another"),
    Examination(
        name="accumulated",
        what="where gradients of two micro-batches are added up",
        routings=_TWO,
        actions=(*_pass("a"), *_pass("b"), *_gradients("sum")),
    ),
    Examination(
        name="second-step",
        what="in the second step",
        routings=_TWO,
        actions=(*_STEP, *_NEXT_STEP),
    ),
    Examination(
        name="interleaved",
        what="where two forward passes are made before their backward passes",
        routings=_TWO,
        actions=(("forward", "a"), ("forward", "b"), ("backward", "a"), ("backward", "b"), *_gradients("sum")),
    ),
    Examination(
        name="evaluation",
        what="where an evaluation comes between forward and backward",
        routings=_TWO,
        actions=(("forward", "a"), ("forward", "b", "evaluate"), ("backward", "a"), *_gradients("a")),
    ),
    Examination(
        name="recompute",
        what="where the forward pass is done again in backward (activation checkpointing)",
        routings=_TWO,
        actions=(
            ("forward", "a", "recompute"),
            ("forward", "b", "recompute"),
            ("backward", "b"),
            ("backward", "a"),
            *_gradients("sum"),
        ),
    ),
    Examination(
        name="two-layers",
        what="where there are two such layers",
        routings={"a": "mixed", "b1": "balanced"},
        layers=2,
        actions=(
            ("forward", "a"),
            ("forward", "b1"),
            ("backward", "a"),
            ("backward", "b1"),
            ("finish", "0"),
            ("finish", "1"),
            ("gradients", "first", "0"),
            ("gradients", "second", "1"),
        ),
    ),
    Examination(
        name="frozen-experts",
        what="where the experts are frozen",
        actions=(("freeze", "experts"), *_STEP),
    ),
    Examination(
        name="frozen-router",
        what="where the router is frozen",
        actions=(("freeze", "router"), *_STEP),
    ),
    Examination(
        name="norm",
        what="in the norm of all gradients",
        actions=(*_STEP, ("norm", "a")),
    ),
    Examination(
        name="optimizer",
        what="after two steps of the optimizer",
        routings=_TWO,
        actions=(*_STEP, ("step",), ("weights", "first"), *_NEXT_STEP, ("step",), ("weights", "after")),
    ),
    Examination(
        name="checkpoint",
        what="where training goes on from a checkpoint",
        routings=_TWO,
        layers=2,
        actions=(
            *_STEP,
            ("step",),
            ("zero",),
            ("save",),
            ("load", "1"),
            ("weights", "loaded", "1"),
            ("forward", "b", "train", "1"),
            ("backward", "b"),
            ("finish", "1"),
            ("gradients", "b", "1"),
            ("step", "1"),
            ("weights", "after", "1"),
        ),
    ),
    Examination(name="weights", what="in the weights as they were given", actions=(("weights", "given"),)),
    Examination(name="initial", what="in the weights that the layer begins with", actions=(("initial",),)),
    Examination(
        name="memory",
        what="in what is kept after a step",
        # What is kept of a call shows as more after a call with many tokens than after one with few. The first calls
        # make what is made once.
        routings={"a": "one-row", "b": "balanced"},
        actions=(*_kept("b"), *_kept("a"), ("memory", "before"), *_kept("b"), ("memory", "after")),
    ),
)
"""In the order of running: small and plain ones first."""


def examinations(only: tuple[str, ...] = ()) -> tuple[Examination, ...]:
    """The examinations named in *only*, or all.

    Raises:
        ValueError: there is none of a name.
    """
    known = [examination.name for examination in EXAMINATIONS]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"there is no examination {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(examination for examination in EXAMINATIONS if not only or examination.name in only)


def batches_of(examination: Examination, claims: Claims, ranks: int, seed: int) -> Batches | None:
    """The choices of every batch; ``None`` where the layer claims nothing about such batches."""
    if ranks < examination.smallest_ranks:
        return None
    found: Batches = {}
    for batch, routing in examination.routings.items():
        label = f"{routing} {batch}"
        counts = _counts(routing, ranks, claims.sizes.experts, seed)
        if routing == "unequal" and (claims.equal_tokens or claims.batch == "shared"):
            return None
        if claims.equal_tokens or not claims.empty_batches:
            if not counts.any():
                return None
            counts = _padded(counts, claims)
        choices = choices_from_counts(counts, claims.sizes.top_k, label, seed)
        if claims.batch == "shared":
            choices = (np.concatenate(choices),) * ranks
            if not claims.empty_batches and not len(choices[0]):
                return None
        found[batch] = choices
    return found


def _counts(routing: str, ranks: int, experts: int, seed: int) -> np.ndarray:
    """``[R, E]``: tokens that have each expert as their first choice."""
    rng = np.random.default_rng([seed, ranks])
    if routing in ROUTINGS:
        return ROUTINGS[routing][0](rng, ranks, experts)
    return _OWN[routing](rng, ranks, experts)


def _unequal(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts, dealt = np.zeros((ranks, experts), dtype=np.int64), 0
    for rank in range(ranks):
        for _ in range(3 + 5 * rank):
            counts[rank, dealt % experts] += 1  # in turn, so that no expert is left without
            dealt += 1
    return counts


def _mixed(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = rng.integers(0, 3, size=(ranks, experts))
    counts[rng.integers(0, ranks, size=experts), np.arange(experts)] += 1
    return counts


def _duplicates(rng: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    counts = np.zeros((ranks, experts), dtype=np.int64)
    counts[:, 1] = 4
    return counts


_OWN: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "mixed": _mixed,
    "unequal": _unequal,
    "duplicates": _duplicates,
}


def _padded(counts: np.ndarray, claims: Claims) -> np.ndarray:
    """More tokens of the same kind, as far as the layer wants equally many on all ranks, or at least one."""
    used = np.flatnonzero(counts.sum(axis=0))
    counts = counts.copy()
    totals = counts.sum(axis=1)
    least = totals.max() if claims.equal_tokens else 1
    for rank, total in enumerate(totals):
        for more in range(max(0, int(least - total))):
            counts[rank, used[more % len(used)]] += 1
    return counts
