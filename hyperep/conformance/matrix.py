# SPDX-License-Identifier: Apache-2.0
"""The compatibility matrix of several reports, as Markdown for the documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hyperep.conformance.catalogue import requirements
from hyperep.conformance.report import Report, badness
from hyperep.conformance.requirement import Requirement
from hyperep.conformance.text import part, world_sizes
from hyperep.conformance.verdict import CONFORMING, Verdict
from hyperep.platform.capabilities import Capability

__all__ = ["NOTED", "anchor", "as_markdown", "by_port", "cell", "counts", "head", "sign", "verdict_on"]

_SIGNS = {
    Verdict.PASSED: "✓",
    Verdict.UNSUPPORTED: "-",
    Verdict.EXPECTED: "(✗)",
    Verdict.SMALL: "",
    Verdict.FAILED: "✗",
    Verdict.MISSING: "✗",
    Verdict.BLOCKED: "…",
    Verdict.UNEXPECTED: "!",
    Verdict.UNMEASURED: "?",
}
NOTED = frozenset({Verdict.FAILED, Verdict.MISSING, Verdict.UNEXPECTED, Verdict.EXPECTED})
"""Verdicts whose message is told below the matrix, and linked from there."""


def cell(report: Report, id: str) -> tuple[Verdict | None, str]:
    """The worst verdict on a requirement over all world sizes, and why; ``None`` if it was not run."""
    results = [r for r in report.results if r.id == id]
    if not results:
        return None, ""
    worst = min(results, key=badness)
    at = "" if worst.verdict in (Verdict.PASSED, Verdict.SMALL) else f"world size {worst.ranks}: "
    return worst.verdict, f"{at}{worst.message}" if worst.message else ""


def sign(report: Report, id: str) -> str:
    """What stands in the matrix for that: a sign, or what was measured."""
    verdict, _ = cell(report, id)
    if verdict is Verdict.MEASURED:
        return f"{max(r.ratio or 0.0 for r in report.results if r.id == id):.1f} x"
    return "" if verdict is None else _SIGNS[verdict]


def counts(report: Report) -> dict[Verdict, int]:
    """How many requirements have which verdict, the worst over all world sizes."""
    found = Counter(verdict for id in requirements() if (verdict := cell(report, id)[0]) is not None)
    return {verdict: found[verdict] for verdict in Verdict if found[verdict]}


def anchor(number: int, id: str) -> str:
    """Where the message of the report with that number on a requirement stands on a page."""
    return f"{id}-{number + 1}"


def as_markdown(reports: Sequence[Report]) -> str:
    """Tables of platforms, capabilities and requirements.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError(
            "a matrix needs at least one report; make one with: hyperep conformance run --report FILE.json"
        )
    heads = [_plain(head(report)) for report in reports]
    lines = [
        "## Platforms",
        "",
        "| platform | distribution | framework | device | world sizes | verdict | requirements | suite | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        told = ", ".join(f"{number} {verdict.value}" for verdict, number in counts(r).items())
        suite = f"{r.suite} ({r.commit})" if r.commit else r.suite
        facts = (r.platform, r.distribution, r.framework, r.device)
        cells = (*facts, world_sizes(r), verdict_on(r), told, suite, r.date)
        lines.append(f"| {' | '.join(map(_plain, cells))} |")
    lines += ["", "## Capabilities", "", f"| capability | {' | '.join(heads)} |", f"|---|{'---|' * len(reports)}"]
    for capability in Capability:
        supports = (_plain(r.capabilities.get(capability.value, "unsupported")) for r in reports)
        lines.append(f"| {capability.value} | {' | '.join(supports)} |")
    lines += ["", "## Requirements", "", _LEGEND, ""]
    for port, of_port in by_port().items():
        lines += [
            f"### {port[0].upper()}{port[1:]}",
            "",
            f"| requirement | {' | '.join(heads)} |",
            f"|---|{'---|' * len(reports)}",
        ]
        for requirement in of_port:
            signs = (_linked(number, report, requirement.id) for number, report in enumerate(reports))
            lines.append(f"| `{requirement.id}` | {' | '.join(signs)} |")
        lines.append("")
    notes = [
        f'- <a id="{anchor(number, id)}"></a>{heads[number]}, `{id}`: {_plain(note)}'
        for number, report in enumerate(reports)
        for id in requirements()
        for verdict, note in [cell(report, id)]
        if verdict in NOTED
    ]
    if notes:
        lines += ["## Failures", "", *notes, ""]
    return "\n".join(lines)


def _linked(number: int, report: Report, id: str) -> str:
    """The sign, with a link to the message if that is told below."""
    text = sign(report, id)
    return f"[{text}](#{anchor(number, id)})" if cell(report, id)[0] in NOTED else text


def by_port() -> dict[str, list[Requirement]]:
    """All requirements, those of one part of the protocol together, in the order in which they are run otherwise."""
    found: dict[str, list[Requirement]] = {}
    for requirement in requirements().values():
        found.setdefault(requirement.port, []).append(requirement)
    return found


_MARKUP = re.compile(r"[\\`*\[\]<>|~$&#]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown, and what is built on it, may take for markup; an underscore inside a word is none."""


def _plain(text: str) -> str:
    """Text of a report, such that it stays text in Markdown: on one line, and nothing in it is markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


_LEGEND = (
    "✓ met at every world size; - declared unsupported, and refused as it must be; ✗ failed; (✗) failed, as the plugin "
    "declares; … blocked by a failure; nothing: not run. Speed is a ratio, and no part of the verdict."
)


def verdict_on(report: Report) -> str:
    """The verdict on a platform, in a few words."""
    if report.conforms is None:
        return f"partial: {part(report)}"
    failed = len({r.id for r in report.results if r.verdict not in CONFORMING})
    known = len({r.id for r in report.results if r.verdict is Verdict.EXPECTED})
    text = "conforms" if report.conforms else f"{failed} requirements not met"
    others = len(requirements().keys() - set(report.ran))
    return text + (f", {known} known failures" if known else "") + (f", {others} not run" if others else "")


def head(report: Report) -> str:
    """Name of a column. A result is one of a device, and says so: the same platform may do worse on another one."""
    return f"{report.platform} ({report.device})"
