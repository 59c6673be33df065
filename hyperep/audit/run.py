# SPDX-License-Identifier: Apache-2.0
"""The audit: every examination on real ranks, judged, and concluded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from hyperep.audit.conclude import Examined, conclude
from hyperep.audit.examinations import Examination, batches_of, examinations
from hyperep.audit.finding import Finding
from hyperep.audit.judge_state import judge_bits
from hyperep.audit.observation import Observed
from hyperep.audit.on_rank import subject_of
from hyperep.audit.ranks import Ranks, ranks_of
from hyperep.audit.report import AuditReport, Line, make_report
from hyperep.audit.shrink import smallest_of
from hyperep.audit.subject import NotOffered, Subject
from hyperep.audit.trial import inputs_for, judged, observe

__all__ = ["audit_on", "check_layer"]

Progress = Callable[[str, int, str], None]


def check_layer(
    subject: Subject | str,
    world_sizes: Sequence[int] = (1, 2, 4),
    *,
    only: Sequence[str] = (),
    seed: int = 0,
    deadline: float = 30.0,
    progress: Progress | None = None,
) -> AuditReport:
    """Audit a layer: examine it on real ranks, and say what is wrong and why.

    Args:
        subject: the layer, or ``"module:name"`` of it. Ranks that are processes of their own import it, so there it
            must lie in a module: in a notebook, write it to a file first.
        world_sizes: numbers of ranks, one after the other.
        only: names of examinations; all, if empty.
        seed: of all numbers.
        deadline: seconds that one examination may take; then the places of all ranks are a finding.
        progress: called with the name of each examination, the number of ranks, and how it ended.

    Raises:
        ValueError: a number of ranks does not divide the experts, an examination is unknown, or *subject* is none.
        PlatformError: the subject's platform cannot be used here.
    """
    found = subject_of(subject)
    experts = found.claims.sizes.experts
    wrong = [ranks for ranks in world_sizes if ranks < 1 or experts % ranks]
    if wrong or not world_sizes:
        raise ValueError(f"world_sizes={list(world_sizes)}: each must be at least 1 and divide experts={experts}")
    chosen = examinations(tuple(only))
    reference = subject if isinstance(subject, str) else None
    began = time.monotonic()
    everything: list[Examined] = []
    lines: list[Line] = []
    for ranks in world_sizes:
        with ranks_of(found, reference, ranks, deadline) as world:
            _examine_all(found, world, chosen, seed, everything, lines, progress)
    findings = conclude(found.claims, everything)
    findings = _completed(found, reference, findings, seed, deadline)
    return make_report(
        found, reference, tuple(world_sizes), seed, tuple(only), time.monotonic() - began, lines, findings
    )


def audit_on(
    world: Ranks, subject: Subject, chosen: Sequence[Examination], seed: int = 0
) -> tuple[list[Finding], list[Line]]:
    """The findings of *chosen* examinations on ranks that are there already."""
    everything: list[Examined] = []
    lines: list[Line] = []
    _examine_all(subject, world, chosen, seed, everything, lines, None)
    return conclude(subject.claims, everything), lines


def _examine_all(
    subject: Subject,
    world: Ranks,
    chosen: Sequence[Examination],
    seed: int,
    everything: list[Examined],
    lines: list[Line],
    progress: Progress | None,
) -> None:
    broken: list[Examined] = []
    for examination in chosen:
        if _hopeless(broken):
            message = "the layer does not get through plain batches on so many ranks"
            lines.append(Line(examination=examination.name, ranks=world.ranks, outcome="not examined", message=message))
            continue
        examined, line = _examine(subject, world, examination, seed)
        lines.append(line)
        if examined is not None:
            everything.append(examined)
            broken += [] if examined.ended else [examined]
        if progress is not None:
            progress(examination.name, world.ranks, line.outcome)


def _hopeless(broken: Sequence[Examined]) -> bool:
    """Whether the layer cannot be built, or fails where nothing is special; each further try may take its deadline."""
    return any("build" in d.candidates[0].names for x in broken for d in x.deviations) or any(
        x.examination.plain for x in broken
    )


def _examine(subject: Subject, world: Ranks, examination: Examination, seed: int) -> tuple[Examined | None, Line]:
    claims = subject.claims
    choices = batches_of(examination, claims, world.ranks, seed)
    line = Line(examination=examination.name, ranks=world.ranks, outcome="ok")
    reason = _why_not(subject, examination, choices is None, world.ranks)
    if reason or choices is None:
        return None, dataclasses.replace(line, outcome="not examined", message=reason)
    began = time.monotonic()
    inputs = inputs_for(subject, examination, choices, seed)
    observed = observe(world, examination, inputs, seed)
    if observed.outcome == "not offered":
        return None, dataclasses.replace(line, outcome="not examined", message=observed.message)
    try:
        examined = judged(subject, examination, inputs, observed)
    except NotOffered as error:
        return None, dataclasses.replace(line, outcome="not examined", message=str(error))
    if examination.repeat and claims.deterministic and not examined.deviations:
        again = observe(world, examination, inputs, seed)
        if again.outcome == "done":
            bits = judge_bits(_flat(observed), _flat(again))
            examined = dataclasses.replace(examined, deviations=tuple(filter(None, [bits])))
    outcome = "ok" if not examined.deviations else "wrong"
    seconds = round(time.monotonic() - began, 3)
    return examined, dataclasses.replace(
        line, outcome=outcome, message=observed.message, detail=observed.detail, seconds=seconds
    )


def _why_not(subject: Subject, examination: Examination, impossible: bool, ranks: int) -> str:
    if impossible:
        return "the layer claims nothing about such batches, or there are too few ranks"
    if examination.name == "initial" and not subject.claims.initial:
        return "training begins with other weights, by claim"
    whole = any(verb in ("step", "norm") for verb, *_ in examination.actions)
    if whole and subject.claims.replicated == "own" and ranks > 1:
        return "gradients of replicated parameters are reduced elsewhere, by claim"
    return ""


def _flat(observed: Observed) -> dict[str, np.ndarray]:
    """Every array that was observed, by a name for people."""
    found: dict[str, np.ndarray] = {}
    for rank, labels in enumerate(observed.found):
        for label, value in labels.items():
            if isinstance(value, np.ndarray):
                found[f"{label} on rank {rank}"] = value
            elif isinstance(value, dict) and label.startswith("gradients"):
                for name, parts in value.items():
                    for i, part in enumerate(parts if isinstance(parts, tuple) else (parts,)):
                        if part.value is not None:
                            found[f"gradient of {name} on rank {rank}" + (f" ({i})" if i else "")] = part.value
    return found


def _completed(
    subject: Subject, reference: str | None, findings: Sequence[Finding], seed: int, deadline: float
) -> list[Finding]:
    """Findings with the smallest input that shows them, and a script."""
    found: dict[int, Finding] = {}
    least = [min((s.ranks for s in f.seen if s.ranks > 1), default=f.seen[0].ranks) for f in findings]
    for ranks in sorted(set(least)):
        with ranks_of(subject, reference, ranks, deadline) as world:
            for number, finding in enumerate(findings):
                if least[number] == ranks:
                    smallest, shown = smallest_of(subject, world, finding, seed)
                    script = subject.script(shown)
                    found[number] = dataclasses.replace(finding, smallest=smallest, script=script)
    return [found[number] for number in range(len(findings))]
