# SPDX-License-Identifier: Apache-2.0
"""The smallest input that shows a finding: fewer tokens, as long as the same cause is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hyperep.audit.examinations import Examination, batches_of, examinations
from hyperep.audit.finding import Finding, Smallest
from hyperep.audit.ranks import Ranks
from hyperep.audit.shown import Shown
from hyperep.audit.subject import NotOffered, Subject
from hyperep.audit.trial import Inputs, inputs_for, judged, observe

__all__ = ["smallest_of"]

_SHRINKABLE = ("input", "output", "tokens", "experts", "router", "shared")
"""Quantities of which fewer tokens say as much. What hangs is not tried again: each try would take its deadline."""
_FEW = (1, 2, 4, 8)


def smallest_of(subject: Subject, world: Ranks, finding: Finding, seed: int) -> tuple[Smallest, Shown]:
    """The smallest input found, on ranks as many as the finding was seen on, and all that a script of it needs."""
    names = {seen.examination for seen in finding.seen if seen.ranks == world.ranks}
    tried = [(examination, _inputs(subject, examination, world.ranks, seed)) for examination in examinations()]
    able = [(e, given) for e, given in tried if e.name in names and given is not None]
    examination, inputs = min(able, key=lambda pair: (len(pair[1].tokens), _total(pair[1])))
    if finding.quantities[0] in _SHRINKABLE:
        for fewer in _fewer(subject, inputs):
            if _total(fewer) < _total(inputs) and _shows(subject, world, examination, fewer, finding, seed):
                inputs = fewer
                break
        for alone in _without_ranks(subject, inputs):
            if _total(alone) and _shows(subject, world, examination, alone, finding, seed):
                inputs = alone
                break
    each = list(inputs.tokens.values())
    smallest = Smallest(
        examination=examination.name,
        ranks=world.ranks,
        tokens=tuple(tuple(len(x) for x in of_batch) for of_batch in each),
    )
    return smallest, Shown(
        title=finding.headline,
        reason=finding.reason,
        ranks=world.ranks,
        layers=examination.layers,
        actions=examination.actions,
        tokens=inputs.tokens,
        cotangents=inputs.cotangents,
        seed=seed,
    )


def _inputs(subject: Subject, examination: Examination, ranks: int, seed: int) -> Inputs | None:
    choices = batches_of(examination, subject.claims, ranks, seed)
    return None if choices is None else inputs_for(subject, examination, choices, seed)


def _total(inputs: Inputs) -> int:
    return sum(len(x) for of_batch in inputs.tokens.values() for x in of_batch)


def _kept(inputs: Inputs, numbers: Sequence[int]) -> Inputs:
    """The first tokens of each rank."""

    def first(of_batch: list[np.ndarray]) -> list[np.ndarray]:
        return [x[:n] for x, n in zip(of_batch, numbers, strict=True)]

    return dataclasses.replace(
        inputs,
        tokens={batch: first(of_batch) for batch, of_batch in inputs.tokens.items()},
        cotangents={batch: first(of_batch) for batch, of_batch in inputs.cotangents.items()},
    )


def _fewer(subject: Subject, inputs: Inputs) -> Iterator[Inputs]:
    ranks = len(next(iter(inputs.tokens.values())))
    for number in _FEW:
        yield _kept(inputs, [number] * ranks)


def _without_ranks(subject: Subject, inputs: Inputs) -> Iterator[Inputs]:
    """The tokens of one rank only, where ranks may be without."""
    claims = subject.claims
    if claims.equal_tokens or not claims.empty_batches or claims.batch == "shared":
        return
    most = max(_total(inputs), 1)
    ranks = len(next(iter(inputs.tokens.values())))
    for rank in range(ranks) if ranks > 1 else ():
        alone = _kept(inputs, [most if r == rank else 0 for r in range(ranks)])
        if _total(alone) < _total(inputs):
            yield alone


def _shows(
    subject: Subject, world: Ranks, examination: Examination, inputs: Inputs, finding: Finding, seed: int
) -> bool:
    """Whether the same cause is found, and is the likeliest one."""
    observed = observe(world, examination, inputs, seed)
    if observed.outcome != "done":
        return False
    try:
        found = judged(subject, examination, inputs, observed).deviations
    except NotOffered:
        return False
    return any(
        deviation.quantity in finding.quantities
        and (deviation.candidates[0].cause, deviation.candidates[0].where) == (finding.cause, finding.where)
        for deviation in found
    )
