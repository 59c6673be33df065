# SPDX-License-Identifier: Apache-2.0
"""The report as a page: self-contained HTML, to be sent to a colleague."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from hyperep.audit.finding import Finding
from hyperep.audit.report import AuditReport
from hyperep.audit.text import verdict

__all__ = ["as_html", "fragment"]

_STYLE = """
.audit { --ink: #1d2329; --dim: #5c6670; --line: #dde2e7; --paper: #fff; --soft: #f5f7f9;
  --bad: #b3261e; --maybe: #8a5a00; --good: #1b6e3c;
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 0 auto; padding: 1.5rem; }
@media (prefers-color-scheme: dark) { .audit { --ink: #e4e8ec; --dim: #9aa5b0; --line: #333b43; --paper: #15191d;
  --soft: #1d2328; --bad: #ff8a80; --maybe: #ffcf70; --good: #7fd8a0; } body.audited { background: #15191d; } }
.audit h1 { font-size: 1.5rem; margin: 0 0 .2rem; } .audit h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.audit .verdict { font-size: 1.1rem; font-weight: 600; margin: .8rem 0; }
.audit .clean { color: var(--good); } .audit .wrong { color: var(--bad); }
.audit p.facts { color: var(--dim); margin: .1rem 0; }
.audit section { border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: 6px;
  padding: .8rem 1rem; margin: .8rem 0; background: var(--paper); }
.audit section.likely { border-left-color: var(--maybe); } .audit section.unknown { border-left-color: var(--dim); }
.audit section h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
.audit dl { display: grid; grid-template-columns: 9rem 1fr; gap: .25rem .8rem; margin: 0; }
.audit dt { color: var(--dim); } .audit dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.audit table { border-collapse: collapse; width: 100%; } .audit .scroll { overflow-x: auto; }
.audit th, .audit td { text-align: left; padding: .25rem .7rem; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.audit th { color: var(--dim); font-weight: 500; } .audit td.ok { color: var(--good); }
.audit td.wrong { color: var(--bad); }
.audit td.not { color: var(--dim); }
.audit pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: 12.5px; border-radius: 4px; }
.audit summary { cursor: pointer; color: var(--dim); }
"""


def as_html(report: AuditReport) -> str:
    """A whole page, which needs nothing from elsewhere."""
    title = f"Audit of {escape(report.subject)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
        f'<body class="audited">{fragment(report)}</body></html>\n'
    )


def fragment(report: AuditReport) -> str:
    """The same as part of a page, a notebook's for instance."""
    return f'<style>{_STYLE}</style><main class="audit">{"".join(_parts(report))}</main>'


def _parts(report: AuditReport) -> Iterator[str]:
    yield f"<h1>Audit of {escape(report.subject)}</h1>"
    yield f'<p class="verdict {"clean" if report.clean else "wrong"}">{escape(verdict(report))}</p>'
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f'<p class="facts">{escape(f"{report.date} · {report.machine} · {versions} · seed {report.seed}")}</p>'
    if report.reference:
        sizes = ",".join(map(str, report.world_sizes))
        command = f"hyperep audit run --subject {report.reference} --world-size {sizes} --seed {report.seed}"
        yield f"<pre>{escape(command)}</pre>"
    for number, finding in enumerate(report.findings, 1):
        yield _section(number, finding)
    yield "<h2>What it claims</h2>"
    claims = ", ".join(f"{name}={_told(value)}" for name, value in report.claims.items())
    yield f'<p class="facts">{escape(claims)}</p>'
    yield "<h2>What was examined</h2>" + _table(report)


def _told(value: object) -> str:
    return "(" + ", ".join(f"{k}={v}" for k, v in value.items()) + ")" if isinstance(value, dict) else str(value)


def _section(number: int, finding: Finding) -> str:
    rows = [("why", escape(finding.reason))] if finding.reason else []
    rows.append(("certainty", escape(finding.certainty)))
    if finding.rivals:
        rows.append(("or else", "<br>".join(map(escape, finding.rivals))))
    if finding.factor is not None and finding.factor != 0:
        rows.append(("factor", escape(f"{finding.factor:.4f} = {', '.join(finding.equals) or 'nothing known'}")))
    if 0 < finding.residual < 1:  # something was fitted
        rows.append(("left unexplained", f"{finding.residual:.1e}, relative"))
    rows += [(f"seen at {_ranks(ranks)}", escape(", ".join(names))) for ranks, names in _seen(finding).items()]
    if finding.smallest is not None:
        tokens = "; ".join(f"[{', '.join(map(str, batch))}]" for batch in finding.smallest.tokens)
        least = f"{finding.smallest.examination} at {_ranks(finding.smallest.ranks)}, tokens of each rank {tokens}"
        rows.append(("smallest input", escape(least)))
    if finding.places:
        rows.append(("ranks stood in", "<br>".join(map(escape, finding.places))))
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    script = (
        "<details><summary>a script that shows it without hyperep</summary>"
        f"<pre>{escape(finding.script)}</pre></details>"
        if finding.script
        else f'<p class="facts">no script: {escape(finding.scriptless)}</p>'
        if finding.scriptless
        else ""
    )
    heading = escape(f"{number}. {finding.headline}")
    return f'<section class="{finding.certainty}"><h3>{heading}</h3><dl>{listed}</dl>{script}</section>'


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _seen(finding: Finding) -> dict[int, list[str]]:
    """Number of ranks -> the examinations."""
    found: dict[int, list[str]] = {}
    for seen in finding.seen:
        found.setdefault(seen.ranks, []).append(seen.examination)
    return found


_SIGNS = {"ok": "ok", "wrong": "wrong", "not examined": "–"}  # noqa: RUF001


def _table(report: AuditReport) -> str:
    lines = {(line.examination, line.ranks): line for line in report.examinations}
    head = "".join(f"<th>{_ranks(ranks)}</th>" for ranks in report.world_sizes)
    rows = []
    for name in dict.fromkeys(line.examination for line in report.examinations):
        cells, notes = "", []
        for ranks in report.world_sizes:
            line = lines[name, ranks]
            cells += f'<td class="{line.outcome.split()[0]}">{_SIGNS[line.outcome]}</td>'
            if line.message and line.message not in notes:
                notes.append(line.message)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}<td class=not>{escape('; '.join(notes))}</td></tr>")
    return f'<div class="scroll"><table><tr><th>examination</th>{head}<th></th></tr>{"".join(rows)}</table></div>'
