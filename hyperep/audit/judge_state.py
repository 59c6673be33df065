# SPDX-License-Identifier: Apache-2.0
"""Why norms, weights, memory and what lies around a call are wrong: pure functions of observed and expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hyperep.audit.candidate import Candidate, Deviation, factor_names
from hyperep.audit.claims import Claims
from hyperep.audit.observation import Whole

__all__ = ["judge_bits", "judge_initial", "judge_input", "judge_memory", "judge_norm", "judge_weights"]


def judge_input(claims: Claims, given: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Deviation | None:
    """Whether the layer has changed its argument."""
    changed = [rank for rank, (a, b) in enumerate(zip(given, after, strict=True)) if not np.array_equal(a, b)]
    if not changed:
        return None
    candidate = Candidate(cause="input-changed", quantity="input", where="rank", values=tuple(changed), cost=0.5)
    return Deviation(quantity="input", error=1.0, candidates=(candidate,))


def judge_bits(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Deviation | None:
    """Whether two runs of the same give the same bits."""
    other = [label for label in first if not np.array_equal(first[label], second[label], equal_nan=True)]
    if not other:
        return None
    detail = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
    error = max(_error(second[label], first[label]) for label in other)
    candidate = Candidate(cause="not-deterministic", quantity="bits", detail=detail, cost=1.0)
    return Deviation(quantity="bits", error=error, candidates=(candidate,))


def judge_norm(
    claims: Claims, ranks: int, expected: Mapping[str, float], observed: Sequence[float]
) -> Deviation | None:
    """What is wrong with the norm of all gradients, as each rank has it."""
    right, found = expected[""], np.array(observed, np.float64)
    errors = np.abs(found - right) / right
    if errors.max() <= claims.tolerance:
        return None
    candidates = []
    for fault, value in expected.items():
        if (
            fault
            and abs(value - right) > 2 * claims.tolerance * right
            and np.all(np.abs(found - value) <= claims.tolerance * max(value, right))
        ):
            candidates.append(Candidate(cause="norm-formula", quantity="norm", detail=fault, cost=2.0))
    own = [expected.get(f"only the experts of rank {rank} are in it") for rank in range(ranks)]
    if None not in own and ranks > 1 and np.abs(found - np.array(own, np.float64)).max() <= claims.tolerance * right:
        fault = "each rank has only its own experts in it, so that ranks clip differently"
        candidates.append(Candidate(cause="norm-formula", quantity="norm", detail=fault, cost=1.5))
    ratio = found / right
    if np.ptp(ratio) <= claims.tolerance * ratio.max():
        names = factor_names(float(ratio[0]), claims, ranks)
        candidates.append(Candidate(cause="scaled", quantity="norm", factor=float(ratio[0]), names=names, cost=4.0))
    values = ", ".join(f"{value:.4g}" for value in found)
    detail = f"{values} where {right:.4g} is right"
    candidates.append(Candidate(cause="unknown", quantity="norm", detail=detail, cost=12.0, residual=1.0))
    return Deviation(quantity="norm", error=float(errors.max()), candidates=tuple(candidates))


def judge_weights(
    claims: Claims,
    label: str,
    expected: Mapping[str, np.ndarray],
    begun: Mapping[str, np.ndarray],
    rivals: Mapping[str, Mapping[str, np.ndarray]],
    wholes: Mapping[str, Whole],
) -> Deviation | None:
    """What is wrong with weights as they were given, loaded, or left by the optimizer."""
    errors = {name: _moved_error(whole.views, expected[name], begun[name]) for name, whole in wholes.items()}
    wrong = {name: error for name, error in errors.items() if not error <= 3 * claims.tolerance}
    if not wrong:
        return None
    candidates = []
    for fault, weights in rivals.items():
        explains = all(_error(wholes[name].views, weights[name][None]) <= 3e-3 for name in wholes)
        if explains and any(_error(weights[name], expected[name]) > 1e-4 for name in wrong):
            candidates.append(Candidate(cause="weights-formula", quantity="weights", detail=fault, cost=2.0))
    apart = [name for name in wrong if len(wholes[name].views) > 1 and _spread(wholes[name].views) > 1e-4]
    if apart:
        detail = ", ".join(apart)
        candidates.append(Candidate(cause="replicas-drift", quantity="weights", detail=detail, cost=1.5))
    candidates += _experts_of_others(claims, expected, wholes)
    detail = ", ".join(wrong)
    candidates.append(Candidate(cause="weights-differ", quantity="weights", detail=f"{detail} ({label})", cost=11.0))
    return Deviation(
        quantity="weights",
        error=max(wrong.values()),
        candidates=tuple(sorted(candidates, key=lambda candidate: candidate.cost)),
    )


def judge_initial(claims: Claims, ranks: int, wholes: Mapping[str, Whole]) -> Deviation | None:
    """Whether experts begin alike, or replicas do not."""
    for name, whole in wholes.items():
        kind, view = claims.kind(name), whole.views[0]
        if kind == "experts" and np.ptp(view) > 0:
            alike = [
                (a, b) for a in range(len(view)) for b in range(a + 1, len(view)) if np.array_equal(view[a], view[b])
            ]
            if alike:
                local = claims.sizes.experts // ranks
                across = all((b - a) % local == 0 for a, b in alike) and ranks > 1
                cause = "initial-alike-on-ranks" if across else "initial-alike"
                detail = f"{name} of experts {alike[0][0]} and {alike[0][1]}, and {len(alike) - 1} more pairs"
                return Deviation(
                    quantity="initial",
                    error=1.0,
                    candidates=(Candidate(cause=cause, quantity="initial", detail=detail, cost=1.0),),
                )
        if kind != "experts" and len(whole.views) > 1 and _spread(whole.views) > 0:
            candidate = Candidate(cause="replicas-begin-apart", quantity="initial", detail=name, cost=1.0)
            return Deviation(quantity="initial", error=_spread(whole.views), candidates=(candidate,))
    return None


def judge_memory(
    claims: Claims, more: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> Deviation | None:
    """Whether a step with *more* tokens leaves more behind, by at least half a token's numbers for each of them.

    Counts and indices may be kept: they are small, and metrics are made of them.
    """
    grown = [int(b - a) for a, b in zip(before, after, strict=True)]
    if all(g < 2 * claims.sizes.dim * max(1, m) for g, m in zip(grown, more, strict=True)):
        return None
    detail = f"{max(grown)} bytes more after a step with many tokens than after one with few, when both are over"
    candidate = Candidate(cause="memory-kept", quantity="memory", detail=detail, cost=1.0)
    return Deviation(quantity="memory", error=float(max(grown)), candidates=(candidate,))


def _experts_of_others(
    claims: Claims, expected: Mapping[str, np.ndarray], wholes: Mapping[str, Whole]
) -> list[Candidate]:
    """Whether experts hold what other experts should."""
    for name, whole in wholes.items():
        if claims.kind(name) != "experts":
            continue
        view, right = whole.views[0], expected[name]
        nearest = [int(np.abs(right - row).reshape(len(right), -1).max(axis=1).argmin()) for row in view]
        if nearest != list(range(len(view))) and _error(view, right[nearest]) < 1e-3:
            moved = ", ".join(f"expert {a} is {b}" for a, b in enumerate(nearest) if a != b)
            return [Candidate(cause="experts-exchanged", quantity="weights", detail=moved, cost=1.8)]
    return []


def _moved_error(views: np.ndarray, expected: np.ndarray, begun: np.ndarray) -> float:
    """Error relative to the way that the weights have come, or to their size if they stayed where they were."""
    way = float(np.linalg.norm(expected - begun))
    size = way if way > 1e-6 else float(np.linalg.norm(expected)) * 0.1
    return max(float(np.linalg.norm(view - expected)) / max(size, 1e-12) for view in views)


def _error(found: np.ndarray, right: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        error = float(np.linalg.norm(found - right)) / max(float(np.linalg.norm(right)), 1e-12)
    return error if np.isfinite(error) else np.inf


def _spread(views: np.ndarray) -> float:
    return float(np.abs(views - views[0]).max())
