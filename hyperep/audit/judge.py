# SPDX-License-Identifier: Apache-2.0
"""All that is wrong in one examination."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hyperep.audit.candidate import Candidate, Deviation
from hyperep.audit.claims import Claims
from hyperep.audit.expectation import Expectation
from hyperep.audit.judge_gradients import judge_gradients
from hyperep.audit.judge_outputs import judge_output, judge_token_gradient
from hyperep.audit.judge_state import judge_initial, judge_input, judge_memory, judge_norm, judge_weights
from hyperep.audit.observation import Observed, put_together

__all__ = ["judge"]


def judge(
    claims: Claims,
    expectation: Expectation,
    tokens: Mapping[str, Sequence[np.ndarray]],
    observed: Observed,
    canonical: Callable[[Any], Any],
) -> list[Deviation]:
    """Compare what was observed with what was expected.

    What is observed later is not judged where an output, a gradient or a weight is wrong already: it follows from that.
    """
    if observed.outcome in ("raised", "hung", "died"):
        at = observed.action.partition(" ")[0]
        cause = "hung-alone" if observed.outcome == "hung" and observed.ranks == 1 else observed.outcome
        candidate = Candidate(cause=cause, quantity="run", detail=observed.message, names=(at,), cost=0.1)
        return [Deviation(quantity="run", error=np.inf, candidates=(candidate,), facts={"places": observed.places})]
    found: list[Deviation] = []
    for label in observed.found[0]:
        kind, _, name = label.partition(":")
        wrong = {deviation.quantity for deviation in found}
        if (wrong & _STOPPING and kind in _JUDGED_NEXT) or (
            wrong & _GRADIENTS and kind in ("output", "norm", "weights")
        ):
            break
        found += _at(claims, expectation, tokens, observed, canonical, kind, name)
    return found


_JUDGED_NEXT = ("output", "tokens", "gradients", "norm", "weights")
_STOPPING = {"output", "input", "weights"}
_GRADIENTS = {"tokens", "experts", "router", "shared"}


def _at(
    claims: Claims,
    expectation: Expectation,
    tokens: Mapping[str, Sequence[np.ndarray]],
    observed: Observed,
    canonical: Callable[[Any], Any],
    kind: str,
    name: str,
) -> list[Deviation]:
    """What is wrong with one thing that was observed."""
    label = f"{kind}:{name}"
    found: list[Deviation | None] = []
    if kind == "output":
        found.append(judge_output(claims, expectation.terms[name], observed.of(label)))  # type: ignore[arg-type]
    elif kind == "after":
        found.append(judge_input(claims, tokens[name], observed.of(label)))  # type: ignore[arg-type]
    elif kind == "tokens":
        found.append(judge_token_gradient(claims, expectation.terms[name], observed.of(label)))
    elif kind == "gradients":
        wholes = put_together(observed.parts(label), canonical)
        kinds = dict.fromkeys(claims.kind(weight) for weight in wholes)
        expected = expectation.gradients[name]
        found += [judge_gradients(claims, each, expectation, expected, wholes) for each in kinds]
    elif kind == "norm":
        values = [float(value) for value in observed.of(label)]  # type: ignore[arg-type]
        found.append(judge_norm(claims, observed.ranks, expectation.norms[name], values))
    elif kind == "weights":
        wholes = put_together(observed.parts(label), canonical)
        weights, begun = expectation.weights[name]
        found.append(judge_weights(claims, name, weights, begun, expectation.rivals[name], wholes))
    elif kind == "initial":
        found.append(judge_initial(claims, observed.ranks, put_together(observed.parts("initial"), canonical)))
    elif label == "memory:after":
        before, after = observed.of("memory:before"), observed.of("memory:after")
        more = [len(b) - len(a) for a, b in zip(tokens["a"], tokens["b"], strict=True)]
        found.append(judge_memory(claims, more, before, after))  # type: ignore[arg-type]
    return [deviation for deviation in found if deviation is not None]
