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

    Gradients are not judged where an output is wrong already: they follow from it.
    """
    if observed.outcome in ("raised", "hung", "died"):
        at = observed.action.partition(" ")[0]
        candidate = Candidate(cause=observed.outcome, quantity="run", detail=observed.message, names=(at,), cost=0.1)
        return [Deviation(quantity="run", error=np.inf, candidates=(candidate,), facts={"places": observed.places})]
    found: list[Deviation | None] = []
    labels = list(observed.found[0])
    for batch, terms in expectation.terms.items():
        if f"output:{batch}" in labels:
            found.append(judge_output(claims, terms, observed.of(f"output:{batch}")))  # type: ignore[arg-type]
            found.append(judge_input(claims, tokens[batch], observed.of(f"after:{batch}")))  # type: ignore[arg-type]
    if not any(found):
        for batch, terms in expectation.terms.items():
            if f"tokens:{batch}" in labels:
                found.append(judge_token_gradient(claims, terms, observed.of(f"tokens:{batch}")))
        for label, expected in expectation.gradients.items():
            wholes = put_together(observed.parts(f"gradients:{label}"), canonical)
            kinds = dict.fromkeys(claims.kind(name) for name in wholes)
            found += [judge_gradients(claims, kind, expectation, expected, wholes) for kind in kinds]
    if not any(found):
        for label, norms in expectation.norms.items():
            values = [float(value) for value in observed.of(f"norm:{label}")]  # type: ignore[arg-type]
            found.append(judge_norm(claims, observed.ranks, norms, values))
        for label, (weights, begun) in expectation.weights.items():
            wholes = put_together(observed.parts(f"weights:{label}"), canonical)
            found.append(judge_weights(claims, label, weights, begun, expectation.rivals[label], wholes))
            if found[-1] is not None:
                break  # what comes after follows from it
    if "initial" in labels:
        found.append(judge_initial(claims, observed.ranks, put_together(observed.parts("initial"), canonical)))
    if "memory:after" in labels:
        before, after = observed.of("memory:before"), observed.of("memory:after")
        found.append(judge_memory(before, after))  # type: ignore[arg-type]
    return [deviation for deviation in found if deviation is not None]
