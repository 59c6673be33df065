# SPDX-License-Identifier: Apache-2.0
"""From what is wrong in each examination to few findings: one cause is told once, with the condition it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.candidate import QUANTITIES, Candidate, Deviation
from hyperep.audit.causes import sentence
from hyperep.audit.claims import Claims
from hyperep.audit.examinations import Examination
from hyperep.audit.expectation import Expectation
from hyperep.audit.finding import Finding, Seen
from hyperep.audit.narrow import narrowed
from hyperep.audit.on_rank import layer_of

__all__ = ["Examined", "conclude"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examined:
    """One examination at one number of ranks, judged."""

    examination: Examination
    ranks: int
    expectation: Expectation
    deviations: tuple[Deviation, ...]
    ended: bool = True
    """Whether the ranks came to the end of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """One deviation, where it was seen."""

    examined: Examined
    deviation: Deviation


def conclude(claims: Claims, everything: Sequence[Examined]) -> list[Finding]:
    """Find the fewest and simplest causes that explain all deviations.

    Where outputs (or the inputs, afterwards) are wrong in plain examinations, nothing is said of gradients: they
    follow, or cannot be judged yet.
    """
    cases = [_Case(examined=x, deviation=d) for x in everything for d in x.deviations]
    found = []
    for quantity in QUANTITIES:
        open_ = [case for case in cases if case.deviation.quantity == quantity]
        while open_:
            key = _best(open_)
            explained = [case for case in open_ if _candidate(case, key) is not None]
            rivals = _rivals(explained, key)
            found.append(_finding(claims, [quantity], key, explained, rivals, everything))
            open_ = [case for case in open_ if case not in explained]
    if any(f.quantities[0] in ("input", "output") and not f.condition for f in found):
        found = [f for f in found if f.quantities[0] not in _FOLLOWING]
    return [_narrowed(finding, everything) for finding in _merged(claims, found)]


def _narrowed(finding: Finding, everything: Sequence[Examined]) -> Finding:
    """Say of an unknown cause at least where it lies."""
    if finding.cause != "unknown":
        return finding
    places = {_place(seen) for seen in finding.seen}
    same = [x for x in everything if (x.examination.name, x.ranks) in places]
    return dataclasses.replace(finding, reason=narrowed({d.quantity for x in same for d in x.deviations}))


_FOLLOWING = ("tokens", "experts", "router", "shared", "norm", "bits")
"""Quantities that are wrong where the output is."""


_Key = tuple[str, str, str]
"""Cause, what the terms have in common, and one name of the factor or the detail."""


def _keys(candidate: Candidate) -> list[_Key]:
    detail = candidate.detail if candidate.cause in _BY_DETAIL else ""
    values = ",".join(map(str, candidate.values)) if candidate.where in ("way", "weight") else ""
    return [(candidate.cause, candidate.where, name + values or detail) for name in candidate.names or ("",)]


_SEEN_ONLY = ("hung", "died", "raised", "not-finite", "gradient-without-tokens", "not-deterministic", "memory-kept")
"""Causes of which the numbers say that they are there, and not from where."""
_BY_DETAIL = ("scores-formula", "scores-exchanged", "backward-formula", "norm-formula", "weights-formula")
"""Causes of which there are several, told apart by their detail."""


def _candidate(case: _Case, key: _Key) -> Candidate | None:
    return next((c for c in case.deviation.candidates if key in _keys(c)), None)


def _best(cases: Sequence[_Case]) -> _Key:
    """The key that explains most, of simple explanations before far-fetched ones."""
    worth: dict[_Key, float] = {}
    for case in cases:
        cheapest: dict[_Key, float] = {}
        for candidate in case.deviation.candidates:
            for key in _keys(candidate):
                cheapest[key] = min(candidate.cost, cheapest.get(key, np.inf))
        for key, cost in cheapest.items():
            worth[key] = worth.get(key, 0.0) + 1.0 / (cost + 1.0)
    return max(worth, key=lambda key: (round(worth[key], 9), not key[2].replace(".", "").isdigit()))


def _rivals(cases: Sequence[_Case], key: _Key) -> list[Candidate]:
    """Candidates of another kind that explain every one of these cases, and are not far-fetched."""
    chosen = _candidate(cases[0], key)
    assert chosen is not None
    rivals: dict[tuple[str, str], Candidate] = {}
    for candidate in cases[0].deviation.candidates:
        other = (candidate.cause, candidate.where)
        if other == (chosen.cause, chosen.where) or candidate.cost > chosen.cost + 1.5 or candidate.cost > 8.0:
            continue
        if any(all(_candidate(case, name) is not None for case in cases) for name in _keys(candidate)):
            rivals.setdefault(other, candidate)
    return list(rivals.values())


def _finding(
    claims: Claims,
    quantities: list[str],
    key: _Key,
    cases: Sequence[_Case],
    rivals: Sequence[Candidate],
    everything: Sequence[Examined],
) -> Finding:
    case = min(cases, key=lambda c: (c.examined.ranks == 1, not c.examined.examination.plain, c.examined.ranks))
    candidate = _candidate(case, key)
    assert candidate is not None
    summary, reason = sentence(candidate, quantities, claims)
    unknown = candidate.cause in ("unknown", "weights-differ", "replicas-differ") or candidate.cost >= 8
    guessed = candidate.cause in _SEEN_ONLY or (candidate.factor is None and candidate.cause == "scaled")
    certainty = "unknown" if unknown else "likely" if rivals or guessed else "certain"
    return Finding(
        cause=candidate.cause,
        quantities=tuple(quantities),
        where=candidate.where,
        summary=summary,
        reason=reason,
        condition=_condition(quantities[0], cases, everything),
        certainty=certainty,
        factor=candidate.factor,
        equals=tuple(name for name in candidate.names[:-1] if not name.isdigit()),
        residual=float(candidate.residual),
        detail=candidate.detail,
        seen=tuple(_seen(cases)),
        rivals=tuple(sentence(rival, quantities, claims)[0] for rival in rivals[:3]),
        places=tuple(map(str, case.deviation.facts.get("places", ()))),  # type: ignore[call-overload]
    )


def _seen(cases: Sequence[_Case]) -> list[Seen]:
    """Each examination once, with the worst error."""
    worst: dict[tuple[str, int], float] = {}
    for case in cases:
        place = case.examined.examination.name, case.examined.ranks
        worst[place] = max(worst.get(place, 0.0), float(case.deviation.error))
    return [Seen(examination=name, ranks=ranks, error=error) for (name, ranks), error in worst.items()]


def _merged(claims: Claims, found: Sequence[Finding]) -> list[Finding]:
    """One finding for what is the same in several quantities; what is told is that of the one that says most."""
    merged: list[Finding] = []
    for finding in found:
        twin = next((i for i, other in enumerate(merged) if _same(other, finding)), None)
        if twin is None:
            merged.append(finding)
            continue
        other = merged[twin]
        quantities = (*other.quantities, *finding.quantities)
        if other.where == finding.where == "all" and finding.cause in ("scaled", "lost"):
            names = (*finding.equals, "")
            candidate = Candidate(cause=finding.cause, quantity=quantities[0], factor=finding.factor, names=names)
            summary, reason = sentence(candidate, list(quantities), claims)
            merged[twin] = dataclasses.replace(other, quantities=quantities, summary=summary, reason=reason)
            continue
        # Gradients of weights say more than those of tokens, in which they are mixed.
        first, second = (finding, other) if other.quantities == ("tokens",) else (other, finding)
        also = " and ".join(QUANTITIES[quantity] for quantity in second.quantities)
        merged[twin] = dataclasses.replace(
            first,
            quantities=(*first.quantities, *second.quantities),
            summary=f"{first.summary}, and {also} likewise",
            seen=(*first.seen, *(seen for seen in second.seen if _place(seen) not in {_place(s) for s in first.seen})),
        )
    return merged


def _place(seen: Seen) -> tuple[str, int]:
    return seen.examination, seen.ranks


_ALIKE = (
    {"all", "way"},
    {"exchanged", "elsewhere", "way+exchanged"},
    {"others", "exchanged"},
)
"""Properties of terms by which one fault shows in different quantities."""


def _same(a: Finding, b: Finding) -> bool:
    if a.cause != b.cause or a.quantities[0] not in _FOLLOWING:
        return False
    if a.cause == "backward-formula":
        return a.detail == b.detail
    if a.where != b.where and not any({a.where, b.where} <= alike for alike in _ALIKE):
        return False
    if a.cause not in ("scaled", "lost", "stale", "unknown"):
        return a.where == b.where and a.cause != "absent"
    if a.cause != "unknown" and (
        a.factor is None or b.factor is None or abs(a.factor - b.factor) > 0.02 * abs(a.factor) + 1e-6
    ):
        return False
    places = [{_place(seen) for seen in finding.seen} for finding in (a, b)]
    return len(places[0] & places[1]) >= 0.6 * len(places[0] | places[1])


def _condition(quantity: str, cases: Sequence[_Case], everything: Sequence[Examined]) -> str:
    """What all examinations in which it was seen have, and clean ones have not; empty if it is seen in plain ones."""
    if quantity in ("norm", "weights", "initial", "memory", "bits"):
        names = [case.examined.examination.name for case in cases]
        return cases[0].examined.examination.what if set(names) == {"checkpoint"} else ""
    seen = [case.examined for case in cases]
    if any(x.examination.plain for x in seen):
        return _of_ranks(seen, everything)
    clean = [x for x in everything if x.ended and not x.deviations and x not in seen]
    for text, has in _FEATURES.items():
        if all(has(x) for x in seen) and not any(has(x) for x in clean):
            return text
    return " or ".join(dict.fromkeys(x.examination.what for x in seen))


def _of_ranks(seen: Sequence[Examined], everything: Sequence[Examined]) -> str:
    """Numbers of ranks, if that is what matters: one is no expert parallelism, and goes without saying."""
    bad, all_ = {x.ranks for x in seen}, {x.ranks for x in everything}
    if len(all_) < 2 or bad == all_ or bad == all_ - {1}:
        return ""
    return f"at {' and '.join(map(str, sorted(bad)))} rank{'s' * (bad != {1})}"


def _tokens(x: Examined) -> list[list[int]]:
    return [[len(terms.tokens) for terms in batch] for batch in x.expectation.terms.values()]


def _busy(x: Examined) -> list[np.ndarray]:
    """Batch -> ``[E]``: how many tokens each expert has."""
    return [sum((t.combine != 0).sum(axis=0) for t in batch) for batch in x.expectation.terms.values()]


def _between(actions: Sequence[Sequence[str]]) -> bool:
    """Whether the same layer is called again before the backward pass of a call."""
    waiting: set[str] = set()
    for verb, *objects in actions:
        if verb == "forward":
            if any(layer_of(batch) == layer_of(objects[0]) for batch in waiting):
                return True
            if "recompute" not in objects:  # its forward is done again right before its backward
                waiting.add(objects[0])
        elif verb == "backward":
            waiting.discard(objects[0])
    return False


def _calls(x: Examined) -> int:
    """How often the layer is called that is called most."""
    layers = [layer_of(batch) for batch in x.expectation.terms]
    return max((layers.count(layer) for layer in layers), default=0)


_FEATURES: dict[str, Callable[[Examined], bool]] = {
    "where some ranks have tokens and others have none": lambda x: any(0 in n and any(n) for n in _tokens(x)),
    "where there is no token at all": lambda x: any(not sum(n) for n in _tokens(x)),
    "where a rank has no token": lambda x: any(0 in n for n in _tokens(x)),
    "where a rank's experts get no token": lambda x: any(
        0 in busy.reshape(x.ranks, -1).sum(axis=1) for busy in _busy(x)
    ),
    "where an expert gets no token": lambda x: any(0 in busy for busy in _busy(x)),
    "where ranks have different numbers of tokens": lambda x: any(len(set(n)) > 1 for n in _tokens(x)),
    "where another call comes between forward and backward": lambda x: _between(x.examination.actions),
    "where a layer is called several times": lambda x: _calls(x) > 1,
}
"""Condition -> whether an examination has it; the narrowest first."""
