# SPDX-License-Identifier: Apache-2.0
"""One trial: inputs for an examination, what the ranks make of them, and what is wrong with that."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from hyperep.audit.conclude import Examined
from hyperep.audit.examinations import Examination
from hyperep.audit.expectation import Expectation, expect
from hyperep.audit.inputs import cotangent_like, tokens_for, weights_for
from hyperep.audit.judge import judge
from hyperep.audit.observation import Observed
from hyperep.audit.on_rank import layer_of
from hyperep.audit.ranks import Ranks
from hyperep.audit.subject import Subject

__all__ = ["Inputs", "inputs_for", "judged", "observe"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What the ranks are given in one examination."""

    weights: list[dict[str, np.ndarray]]
    tokens: dict[str, list[np.ndarray]]
    cotangents: dict[str, list[np.ndarray]]


def inputs_for(
    subject: Subject, examination: Examination, choices: Mapping[str, Sequence[np.ndarray]], seed: int
) -> Inputs:
    """Weights, and tokens that make the choices wanted."""
    weights = [weights_for(subject.claims, seed + layer) for layer in range(examination.layers)]
    tokens: dict[str, list[np.ndarray]] = {}
    cotangents: dict[str, list[np.ndarray]] = {}
    for batch, each in choices.items():
        router = weights[int(layer_of(batch))]["router"]
        same = subject.claims.batch == "shared"
        labels = [f"{batch} {0 if same else rank}" for rank in range(len(each))]
        tokens[batch] = [tokens_for(c, router, label, seed) for c, label in zip(each, labels, strict=True)]
        if examination.name == "duplicates":
            tokens[batch] = [np.repeat(x[:1], len(x), axis=0) for x in tokens[batch]]
        pairs = zip(tokens[batch], labels, strict=True)
        cotangents[batch] = [cotangent_like(x, label, seed) for x, label in pairs]
    return Inputs(weights=weights, tokens=tokens, cotangents=cotangents)


def observe(world: Ranks, examination: Examination, inputs: Inputs, seed: int) -> Observed:
    """Have the ranks carry out the examination."""
    folder = tempfile.mkdtemp(prefix="hyperep-audit-")
    try:
        return world.observe(
            actions=examination.actions,
            weights=[_float32(w) for w in inputs.weights],
            tokens={batch: [x.astype(np.float32) for x in each] for batch, each in inputs.tokens.items()},
            cotangents={batch: [x.astype(np.float32) for x in each] for batch, each in inputs.cotangents.items()},
            seed=seed,
            folder=folder,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def judged(subject: Subject, examination: Examination, inputs: Inputs, observed: Observed) -> Examined:
    """Compare with the reference.

    Raises:
        NotOffered: the optimizer is none that the reference has.
    """
    claims = subject.claims
    optimizer = observed.found[0].get("optimizer") if observed.found else None
    ended = observed.outcome == "done"
    actions = examination.actions if ended else [a for a in examination.actions if a[0] in ("forward", "backward")]
    expectation: Expectation = expect(
        claims,
        actions,
        inputs.weights,
        inputs.tokens,
        inputs.cotangents,
        optimizer,  # type: ignore[arg-type]
    )
    given = {batch: [x.astype(np.float32) for x in each] for batch, each in inputs.tokens.items()}
    return Examined(
        examination=examination,
        ranks=observed.ranks,
        expectation=expectation,
        deviations=tuple(judge(claims, expectation, given, observed, subject.canonical)),
        ended=ended,
    )


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}
