# SPDX-License-Identifier: Apache-2.0
"""The audit: every examination on real ranks, judged, and concluded."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hyperep.audit.claims import Claims
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
    with contextlib.ExitStack() as stack:
        worlds: dict[int, Ranks] = {}
        for ranks in world_sizes:
            if ranks not in worlds:
                worlds[ranks] = stack.enter_context(ranks_of(found, reference, ranks, deadline))
            _examine_all(found, worlds[ranks], chosen, seed, everything, lines, progress)
        findings = _completed(found, worlds, conclude(found.claims, everything), seed)
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
    reason = _why_not(claims, examination, choices is None, world.ranks)
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


def _why_not(claims: Claims, examination: Examination, impossible: bool, ranks: int) -> str:
    if ranks < examination.smallest_ranks:
        return f"it takes {examination.smallest_ranks} ranks"
    if impossible:
        return "the layer claims nothing about such batches"
    if examination.name == "initial" and not claims.initial:
        return "training begins with other weights, by claim"
    whole = any(verb in ("step", "norm") for verb, *_ in examination.actions)
    if whole and claims.replicated == "own" and ranks > 1:
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


def _completed(subject: Subject, worlds: Mapping[int, Ranks], findings: Sequence[Finding], seed: int) -> list[Finding]:
    """Findings with the smallest input that shows them, and a script; *worlds* are those that they were seen on."""
    completed = []
    for finding in findings:
        ranks = min((seen.ranks for seen in finding.seen if seen.ranks > 1), default=finding.seen[0].ranks)
        smallest, shown = smallest_of(subject, worlds[ranks], finding, seed)
        finding = dataclasses.replace(finding, smallest=smallest)
        try:
            completed.append(dataclasses.replace(finding, script=subject.script(shown)))
        except NotOffered as error:
            completed.append(dataclasses.replace(finding, scriptless=str(error)))
    return completed
