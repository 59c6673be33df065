# SPDX-License-Identifier: Apache-2.0
"""The compatibility matrix of several reports: Markdown for the documentation, and one HTML page with filters."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Sequence

from hyperep.conformance.catalogue import requirements
from hyperep.conformance.report import Report
from hyperep.conformance.requirement import Requirement
from hyperep.conformance.text import part, world_sizes
from hyperep.conformance.verdict import CONFORMING, WORST_FIRST, Verdict
from hyperep.platform.capabilities import Capability

__all__ = ["as_html", "as_markdown", "cell"]

_SIGNS = {
    Verdict.PASSED: "✓",
    Verdict.UNSUPPORTED: "-",
    Verdict.EXPECTED: "(✗)",
    Verdict.SMALL: "",
    Verdict.FAILED: "✗",
    Verdict.MISSING: "✗",
    Verdict.BLOCKED: "…",
    Verdict.UNEXPECTED: "!",
}


def cell(report: Report, id: str) -> tuple[Verdict | None, str]:
    """The worst verdict on a requirement over all world sizes, and why; ``None`` if it was not run."""
    results = [r for r in report.results if r.id == id]
    if not results:
        return None, ""
    worst = min(results, key=lambda r: WORST_FIRST.index(r.verdict))
    at = "" if worst.verdict in (Verdict.PASSED, Verdict.SMALL) else f"world size {worst.ranks}: "
    return worst.verdict, f"{at}{worst.message}" if worst.message else ""


def as_markdown(reports: Sequence[Report]) -> str:
    """Tables of platforms, capabilities and requirements.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError(
            "a matrix needs at least one report; make one with: hyperep conformance run --report FILE.json"
        )
    heads = [_plain(_head(report)) for report in reports]
    lines = [
        "## Platforms",
        "",
        "| platform | distribution | framework | device | world sizes | verdict | suite | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        cells = (r.platform, r.distribution, r.framework, r.device, world_sizes(r), _verdict(r), r.suite, r.date)
        lines.append(f"| {' | '.join(map(_plain, cells))} |")
    lines += ["", "## Capabilities", "", f"| capability | {' | '.join(heads)} |", f"|---|{'---|' * len(reports)}"]
    for capability in Capability:
        supports = (_plain(r.capabilities.get(capability.value, "unsupported")) for r in reports)
        lines.append(f"| {capability.value} | {' | '.join(supports)} |")
    lines += ["", "## Requirements", "", _LEGEND, ""]
    for port, of_port in _by_port().items():
        lines += [
            f"### {port[0].upper()}{port[1:]}",
            "",
            f"| requirement | {' | '.join(heads)} |",
            f"|---|{'---|' * len(reports)}",
        ]
        for requirement in of_port:
            verdicts = (cell(report, requirement.id)[0] for report in reports)
            lines.append(f"| `{requirement.id}` | {' | '.join('' if v is None else _SIGNS[v] for v in verdicts)} |")
        lines.append("")
    notes = [
        f"- {head}, `{id}`: {_plain(note)}"
        for head, report in zip(heads, reports, strict=True)
        for id in requirements()
        for verdict, note in [cell(report, id)]
        if verdict in (Verdict.FAILED, Verdict.MISSING, Verdict.UNEXPECTED, Verdict.EXPECTED)
    ]
    if notes:
        lines += ["## Failures", "", *notes, ""]
    return "\n".join(lines)


def _by_port() -> dict[str, list[Requirement]]:
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
    "declares; … blocked by a failure; nothing: not run."
)


def _verdict(report: Report) -> str:
    if report.conforms is None:
        return f"partial: {part(report)}"
    failed = len({r.id for r in report.results if r.verdict not in CONFORMING})
    known = len({r.id for r in report.results if r.verdict is Verdict.EXPECTED})
    text = "conforms" if report.conforms else f"{failed} requirements not met"
    others = len(requirements().keys() - set(report.ran))
    return text + (f", {known} known failures" if known else "") + (f", {others} not run" if others else "")


def _head(report: Report) -> str:
    """Name of a column. A result is one of a device, and says so: the same platform may do worse on another one."""
    return f"{report.platform} ({report.device})"


def as_html(reports: Sequence[Report]) -> str:
    """One page that needs nothing else: the same tables, with filters by text, level, capability and verdict.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError(
            "a matrix needs at least one report; make one with: hyperep conformance run --report FILE.json"
        )
    heads = [_head(report) for report in reports]
    rows = []
    for r in itertools.chain.from_iterable(_by_port().values()):
        cells = [cell(report, r.id) for report in reports]
        rows.append(
            {
                "id": r.id,
                "demand": r.demand,
                "level": r.level.value,
                "port": r.port,
                "capabilities": [c.value for c in r.capabilities],
                "cells": [[v.value if v else "not run", _SIGNS[v] if v else "", note] for v, note in cells],
            }
        )
    platforms = [
        {
            "head": head,
            "facts": [
                r.distribution,
                r.framework,
                r.device,
                f"world sizes {world_sizes(r)}",
                r.suite,
                r.machine,
                r.date,
            ],
            "verdict": _verdict(r),
            "sign": {True: "passed", False: "failed", None: "partial"}[r.conforms],
        }
        for head, r in zip(heads, reports, strict=True)
    ]
    # No "<" in the script that the data stand in: "</script>" would end it, and "<!--<script>" take its end away.
    data = json.dumps({"platforms": platforms, "rows": rows}).replace("<", "\\u003c")
    # The data last, for they may hold anything.
    return _PAGE.replace("@TITLE@", html.escape("hyperep: conformance of platforms")).replace("@DATA@", data)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@TITLE@</title>
<style>
 :root { color-scheme: light dark; }
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
 .platforms { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
 .platforms div { border: 1px solid #8886; border-radius: .5rem; padding: .6rem 1rem; }
 .platforms small { display: block; opacity: .75; }
 .filters { position: sticky; top: 0; background: Canvas; padding: .6rem 0; }
 .filters { display: flex; flex-wrap: wrap; gap: .6rem; }
 table { border-collapse: collapse; width: 100%; }
 th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #8883; vertical-align: top; }
 td.v { text-align: center; white-space: nowrap; }
 td small { opacity: .75; }
 .passed { color: #1a7f37; } .failed, .missing, .unexpected { color: #cf222e; font-weight: bold; }
 .blocked, .expected, .partial { color: #9a6700; }
 tr.port th { padding-top: 1.2rem; font-size: 1.1em; }
</style></head><body>
<h1>@TITLE@</h1>
<div class="platforms" id="platforms"></div>
<div class="filters">
 <input id="text" type="search" placeholder="id or words" aria-label="id or words">
 <select id="level" aria-label="level"></select>
 <select id="capability" aria-label="capability"></select>
 <select id="verdict" aria-label="verdict"></select>
 <span id="shown"></span>
</div>
<table><thead id="head"></thead><tbody id="body"></tbody></table>
<script>
const data = @DATA@;
const $ = id => document.getElementById(id);
const make = (tag, text = "", cls = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className: cls });
for (const p of data.platforms) {
  const box = make("div");
  box.append(make("b", p.head), " ", make("span", p.verdict, p.sign));
  for (const fact of p.facts) if (fact) box.append(make("small", fact));
  $("platforms").append(box);
}
const options = (id, label, values) => {
  $(id).append(new Option(label, ""), ...[...new Set(values)].sort().map(v => new Option(v, v)));
  $(id).onchange = show;
};
options("level", "every level", data.rows.map(r => r.level));
options("capability", "every capability", data.rows.flatMap(r => r.capabilities));
options("verdict", "every verdict", data.rows.flatMap(r => r.cells.map(c => c[0])));
$("text").oninput = show;
const head = make("tr");
head.append(make("th", "requirement"), ...data.platforms.map(p => make("th", p.head)));
$("head").append(head);
function show() {
  const text = $("text").value.toLowerCase(), level = $("level").value;
  const capability = $("capability").value, verdict = $("verdict").value;
  const rows = data.rows.filter(r =>
    (!text || (r.id + " " + r.demand).toLowerCase().includes(text)) && (!level || r.level === level) &&
    (!capability || r.capabilities.includes(capability)) && (!verdict || r.cells.some(c => c[0] === verdict)));
  $("body").replaceChildren();
  let port = null;
  for (const r of rows) {
    if (r.port !== port) {
      const row = make("tr", "", "port"), cell = make("th", port = r.port);
      cell.colSpan = data.platforms.length + 1;
      row.append(cell);
      $("body").append(row);
    }
    const row = make("tr"), name = make("td");
    name.append(make("code", r.id), make("br"), make("small", r.demand));
    row.append(name);
    for (const [v, sign, note] of r.cells) {
      const c = make("td", sign, "v " + v.split(" ")[0]);
      c.title = note ? v + ": " + note : v;
      row.append(c);
    }
    $("body").append(row);
  }
  $("shown").textContent = rows.length + " of " + data.rows.length + " requirements";
}
show();
</script></body></html>
"""
