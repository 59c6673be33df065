# SPDX-License-Identifier: Apache-2.0
"""Why gradients of weights are wrong: pure functions of what was observed and of the reference's terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hyperep.audit.candidate import Candidate, Deviation
from hyperep.audit.claims import Claims
from hyperep.audit.evidence import Block, gradient_blocks
from hyperep.audit.expectation import Expectation, Expected
from hyperep.audit.fit import deviating, scale_of
from hyperep.audit.judge_outputs import by_patterns
from hyperep.audit.observation import Whole
from hyperep.audit.rivals import rivals_of

__all__ = ["judge_gradients"]

_GROUPS = {
    "experts": ((), ("step",), ("rank",), ("rank", "step")),
    "shared": ((), ("step",), ("rank",), ("rank", "step")),
    "router": ((), ("step",), ("rank",), ("owner",), ("rank", "step"), ("rank", "owner")),
}


def judge_gradients(
    claims: Claims, kind: str, expectation: Expectation, expected: Expected, wholes: dict[str, Whole]
) -> Deviation | None:
    """What is wrong with the gradients of the weights of one *kind*, if anything is."""
    mine = {name: whole for name, whole in wholes.items() if claims.kind(name) == kind}
    if kind in expected.frozen:
        return _of_frozen(kind, mine)
    absent = list(_absent(claims, kind, expectation, expected, mine))
    if absent and not _harmless(expectation, expected, absent):
        return Deviation(quantity=kind, error=1.0, candidates=tuple(absent))
    if any(not np.isfinite(whole.views).all() for whole in mine.values()):
        where = ", ".join(_places_of_nan(claims, kind, mine))
        return Deviation(
            quantity=kind,
            error=np.inf,
            candidates=(Candidate(cause="not-finite", quantity=kind, detail=where, cost=0.3),),
        )
    blocks = gradient_blocks(claims, kind, expectation, expected, mine)
    wrong, error = deviating(blocks, claims.tolerance)
    if not wrong:
        return None
    ranks = len(next(iter(expectation.terms.values())))
    found = by_patterns(kind, claims, ranks, blocks, _GROUPS[kind])
    found += _out_of_nothing(kind, claims, wrong, blocks)
    found += _blocks_exchanged(kind, claims, blocks)
    found += _other_formula(claims, kind, expectation, expected, mine, blocks)
    if any(whole.replicated for whole in mine.values()):
        found += _of_other_rank(kind, claims, blocks)
    unknown = Candidate(cause="unknown", quantity=kind, cost=12.0, residual=1.0)
    candidates = tuple(sorted([*found, unknown], key=lambda candidate: candidate.cost))
    return Deviation(quantity=kind, error=error, candidates=candidates)


def _of_frozen(kind: str, wholes: Mapping[str, Whole]) -> Deviation | None:
    if all((whole.absent | (whole.views == 0)).all() for whole in wholes.values()):
        return None
    return Deviation(quantity=kind, error=1.0, candidates=(Candidate(cause="frozen", quantity=kind, cost=0.5),))


def _harmless(expectation: Expectation, expected: Expected, absent: Sequence[Candidate]) -> bool:
    """Whether nobody can mind that gradients are absent: there was no token on any rank, or there is one rank only."""
    due = [terms for batch in expected.due for terms in expectation.terms[batch]]
    without = all(candidate.cause == "absent-without-tokens" for candidate in absent)
    alone = len(next(iter(expectation.terms.values()))) == 1
    return not any(len(terms.tokens) for terms in due) or (without and alone)


def _absent(
    claims: Claims, kind: str, expectation: Expectation, expected: Expected, wholes: Mapping[str, Whole]
) -> Iterator[Candidate]:
    """Gradients that are ``None``, which optimizers and reductions skip."""
    lacking = {name: whole.absent for name, whole in wholes.items() if whole.absent.any()}
    if not lacking:
        return
    some = next(iter(lacking.values()))
    viewers = [v for v in range(len(some)) if some[v].any()]
    if kind != "experts":
        where = "all" if len(viewers) == len(some) else "viewer"
        yield Candidate(cause="absent", quantity=kind, where=where, values=tuple(viewers), cost=0.5)
        return
    experts = [e for e in range(some.shape[1]) if some[:, e].any()]
    busy = np.zeros(claims.sizes.experts)
    for batch in expected.due:
        for terms in expectation.terms[batch]:
            busy += (terms.combine != 0).sum(axis=0)
    idle = [e for e in experts if not busy[e]]
    if idle:
        yield Candidate(cause="absent-without-tokens", quantity=kind, where="expert", values=tuple(idle), cost=0.5)
    else:
        yield Candidate(cause="absent", quantity=kind, where="expert", values=tuple(experts), cost=0.5)


def _places_of_nan(claims: Claims, kind: str, wholes: Mapping[str, Whole]) -> Iterator[str]:
    for name, whole in wholes.items():
        bad = ~np.isfinite(whole.views)
        if bad.any() and kind == "experts":
            yield f"{name} of experts {[e for e in range(bad.shape[1]) if bad[:, e].any()]}"
        elif bad.any():
            yield f"{name} on {int(bad.reshape(len(bad), -1).any(axis=1).sum())} ranks"


def _out_of_nothing(kind: str, claims: Claims, wrong: Sequence[Block], blocks: Sequence[Block]) -> Iterator[Candidate]:
    """Whether the wrong ones are all gradients of experts that no token has chosen."""
    small = claims.tolerance * scale_of(blocks)
    if kind == "experts" and all(np.linalg.norm(block.vectors) <= small for block in wrong):
        experts = tuple(sorted({block.labels[0].expert for block in wrong}))  # type: ignore[type-var]
        yield Candidate(cause="gradient-without-tokens", quantity=kind, where="expert", values=experts, cost=1.5)


def _blocks_exchanged(kind: str, claims: Claims, blocks: Sequence[Block]) -> Iterator[Candidate]:
    """Whether an expert has the gradient of another expert, or a weight that of another weight."""
    if kind == "router":
        yield from _rows_of_router(claims, blocks)
        return
    scale, pairs = scale_of(blocks), {}
    for block in blocks:
        if np.linalg.norm(block.observed - block.expected) <= claims.tolerance * max(
            float(np.linalg.norm(block.expected)), 0.2 * scale
        ):
            continue
        twin = next((other for other in blocks if other is not block and _equal(block, other, claims, scale)), None)
        if twin is None:
            return
        pairs[block.labels[0]] = twin.labels[0]
    experts = sorted({(a.expert, b.expert) for a, b in pairs.items() if a.expert != b.expert})
    weights = sorted({(a.weight, b.weight) for a, b in pairs.items() if a.weight != b.weight})
    if experts:
        detail = ", ".join(f"expert {a} has that of expert {b}" for a, b in experts)
        yield Candidate(cause="experts-exchanged", quantity=kind, detail=detail, cost=2.5)
    elif weights:
        detail = ", ".join(f"{a} has that of {b}" for a, b in weights)
        yield Candidate(cause="weights-exchanged", quantity=kind, detail=detail, cost=2.5)


def _equal(block: Block, other: Block, claims: Claims, scale: float) -> bool:
    right = other.expected
    if right.shape != block.observed.shape or not block.observed.any():
        return False
    size = max(float(np.linalg.norm(right)), 0.2 * scale)
    return float(np.linalg.norm(block.observed - right)) <= 2 * claims.tolerance * size


def _rows_of_router(claims: Claims, blocks: Sequence[Block]) -> Iterator[Candidate]:
    for block in blocks:
        found = block.observed.reshape(claims.sizes.experts, -1)
        right = block.expected.reshape(found.shape)
        size = np.linalg.norm(right, axis=1).max(initial=1e-12)
        nearest = [int(np.linalg.norm(right - row, axis=1).argmin()) for row in found]
        moved = right[nearest]
        if np.linalg.norm(moved - found) > 2 * claims.tolerance * size or nearest == list(range(len(nearest))):
            return
    pairs = ", ".join(f"row {a} is that of expert {b}" for a, b in enumerate(nearest) if a != b)
    yield Candidate(cause="experts-exchanged", quantity="router", detail=pairs, cost=2.5)


def _other_formula(
    claims: Claims,
    kind: str,
    expectation: Expectation,
    expected: Expected,
    wholes: Mapping[str, Whole],
    blocks: Sequence[Block],
) -> Iterator[Candidate]:
    """Whether the gradient is what a known mistake in the backward pass gives."""
    if kind == "shared" or any(len(whole.views) > 1 and claims.replicated == "own" for whole in wholes.values()):
        return
    ranks = len(next(iter(expectation.terms.values())))
    part = 1.0 if claims.reduction == "sum" and claims.batch == "own" else 1.0 / ranks
    faults: dict[str, dict[str, np.ndarray]] = {}
    for batch in expected.due:
        for terms in expectation.terms[batch]:
            rivals = rivals_of(terms)
            variants = rivals.experts if kind == "experts" else rivals.router
            for fault, gradients in variants.items():
                sums = faults.setdefault(fault, {})
                for name, value in gradients.items():
                    sums[name] = sums.get(name, 0.0) + part * value
    for fault, gradients in faults.items():
        lost = sum(float(((wholes[n].views - gradients[n][None]) ** 2).sum()) for n in wholes)
        size = sum(float((gradients[n] ** 2).sum()) * len(wholes[n].views) for n in wholes)
        if size > 0 and np.sqrt(lost / size) < 2 * claims.tolerance:
            yield Candidate(cause="backward-formula", quantity=kind, detail=fault, cost=2.2)
            return


def _of_other_rank(kind: str, claims: Claims, blocks: Sequence[Block]) -> Iterator[Candidate]:
    """Whether replicas disagree: something that pattern finding says better, if it can say it."""
    views = [block.observed for block in blocks if block.labels[0].weight == blocks[0].labels[0].weight]
    size = np.linalg.norm(views[0])
    if claims.replicated == "reduced" and any(np.linalg.norm(v - views[0]) > claims.tolerance * size for v in views):
        yield Candidate(cause="replicas-differ", quantity=kind, cost=9.0)
