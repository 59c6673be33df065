# SPDX-License-Identifier: Apache-2.0
"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hyperep.audit.finding import Finding
from hyperep.audit.report import AuditReport

__all__ = ["as_text", "verdict"]

_STYLES = {"certain": "bold red", "likely": "bold yellow", "unknown": "bold magenta"}


def as_text(report: AuditReport, *, details: bool = False) -> RenderableType:
    """What ``hyperep audit run`` prints: the findings, what was not examined, and the verdict."""
    parts: list[RenderableType] = []
    for number, finding in enumerate(report.findings, 1):
        parts.append(Text.assemble((f"{number}. ", "bold"), (finding.headline, _STYLES[finding.certainty])))
        parts += [Padding(line, (0, 0, 0, 3)) for line in _lines(finding)]
        parts.append(Text())
    if details:
        parts.append(_table(report))
    parts += [Text(line, style="dim") for line in _not_examined(report)]
    parts.append(Text(verdict(report), style="bold green" if report.clean else "bold red"))
    return Group(*parts)


def verdict(report: AuditReport) -> str:
    """One line."""
    sizes = ", ".join(map(str, report.world_sizes))
    run = sum(line.outcome != "not examined" for line in report.examinations)
    found = (
        "nothing wrong found" if report.clean else f"{len(report.findings)} finding{'s' * (len(report.findings) > 1)}"
    )
    return f"{report.subject} at {sizes} ranks: {found} in {run} examinations, {report.seconds:.0f} s"


def _lines(finding: Finding) -> Iterator[Text]:
    if finding.reason:
        yield Text.assemble(("why    ", "bold"), finding.reason)
    likely = "the numbers fit others, too" if finding.rivals else "it is there, and the numbers do not say from where"
    sure = {
        "certain": "certain: nothing else explains it, and nothing is left unexplained",
        "likely": f"likely: {likely}",
    }
    how = sure.get(finding.certainty, "the cause is unknown")
    yield Text.assemble(("sure   ", "bold"), how + (f" (or: {'; '.join(finding.rivals)})" if finding.rivals else ""))
    names = list(dict.fromkeys(seen.examination for seen in finding.seen))
    ranks = ", ".join(map(str, sorted({seen.ranks for seen in finding.seen})))
    error = max(seen.error for seen in finding.seen)
    told = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    size = f", relative error up to {error:.3g}" if error < float("inf") and finding.quantities != ("memory",) else ""
    yield Text.assemble(("seen   ", "bold"), f"in {told}, at {ranks} ranks{size}")
    if finding.smallest is not None:
        tokens = "; ".join(", ".join(map(str, batch)) for batch in finding.smallest.tokens)
        ranks = f"{finding.smallest.ranks} rank{'s' * (finding.smallest.ranks > 1)}"
        yield Text.assemble(("least  ", "bold"), f"{finding.smallest.examination} at {ranks}, tokens of each: {tokens}")
    for place in finding.places:
        yield Text.assemble(("where  ", "bold"), place)


def _not_examined(report: AuditReport) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for line in report.examinations:
        if line.outcome == "not examined":
            names = reasons.setdefault(line.message, [])
            name = f"{line.examination}@{line.ranks}"
            names.append(name)
    examined = {line.examination for line in report.examinations if line.outcome != "not examined"}
    for reason, names in reasons.items():
        never = list(dict.fromkeys(name.partition("@")[0] for name in names if name.partition("@")[0] not in examined))
        if never:
            yield f"not examined: {', '.join(never)}: {reason}"


def _table(report: AuditReport) -> Table:
    table = Table("examination", *(f"{ranks} ranks" for ranks in report.world_sizes), box=None)
    outcomes = {(line.examination, line.ranks): line.outcome for line in report.examinations}
    signs = {"ok": "[green]ok[/]", "wrong": "[red]wrong[/]", "not examined": "[dim]-[/]"}
    for name in dict.fromkeys(line.examination for line in report.examinations):
        table.add_row(name, *(signs[outcomes[name, ranks]] for ranks in report.world_sizes))
    return table
