# SPDX-License-Identifier: Apache-2.0
"""A report as plain text: what to look at first, what is blocked behind it, and how to run it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hyperep.conformance.catalogue import requirements
from hyperep.conformance.report import Report, Result
from hyperep.conformance.suite import failures_first
from hyperep.conformance.verdict import Verdict

__all__ = ["failure", "listing", "part", "reproduction", "summary", "world_sizes"]


def reproduction(platform: str, result: Result, seed: int) -> str:
    """The line that runs one requirement again."""
    what = f"--platform {platform} --world-size {result.ranks} --only {result.id} --seed {seed}"
    return f"hyperep conformance run {what} --details"


def failure(platform: str, result: Result, seed: int) -> str:
    """Everything about one result, for whoever has to find the cause."""
    demand = requirements()[result.id].demand
    lines = [
        f"{result.id} at world size {result.ranks}: {result.verdict.value}",
        f"  demand: {demand}",
        f"  found: {result.message}",
        f"  seed: {seed}",
        f"  again: {reproduction(platform, result, seed)}",
    ]
    return "\n".join([*lines, *([result.detail] if result.detail else [])])


def summary(report: Report, *, details: bool = False) -> str:
    """The report for a terminal: one line for each fault, those that block most others first."""
    lines: list[str] = []
    faults = failures_first(report.results)
    behind = Counter(
        (r.message.removeprefix("blocked by "), r.ranks) for r in report.results if r.verdict is Verdict.BLOCKED
    )
    if faults and details:
        lines += [failure(report.platform, result, report.seed) + "\n" for result in faults]
    if faults:
        lines.append("To do, what blocks most others first:")
        lines += [_line(id, results, behind) for id, results in _by_id(faults).items()]
        again = reproduction(report.platform, faults[0], report.seed)
        lines += ["", f"Again, with everything that is known about it:\n  {again}"]
        lines.append(
            "If it passes alone, look for a race, or for what earlier requirements left behind: in a whole run all of\n"
            "them share the ranks of a world. Leave --only out, or add --repeat 20."
        )
    expected = [r for r in report.results if r.verdict is Verdict.EXPECTED]
    if expected:
        lines.append("Known failures, as the plugin declares them:")
        lines += [f"  {id} (world size {_sizes(rs)}): {rs[0].message}" for id, rs in _by_id(expected).items()]
    speeds = [r for r in report.results if r.verdict in (Verdict.MEASURED, Verdict.UNMEASURED)]
    if speeds:
        lines.append("Speed, beside the platform's own primitives; no part of the verdict:")
        lines += [f"  {r.id} (world size {r.ranks}): {_measured(r)}" for r in speeds]
    lines += [f"Announced: {sentence}" for sentence in report.announced]
    lines += [f"Remark: {sentence}" for sentence in report.remarks]
    if report.output:
        lines += [f"--- printed by {rank}:\n{text.rstrip()}" for rank, text in report.output.items()]
    lines += ["", _verdict(report)]
    return "\n".join(lines).strip("\n")


def world_sizes(report: Report) -> str:
    """Those that were run, and those of a whole run that were not: ``1, 2 (4 not run)``."""
    missing = report.sizes_not_run
    return _listed(report.world_sizes) + (f" ({_listed(missing)} not run)" if missing else "")


def part(report: Report) -> str:
    """What became of the part of the suite that was asked for: ``38 of 199 asked for: passed``."""
    return f"{len(report.asked)} of {report.requirements} asked for: {'passed' if report.passed else 'not passed'}"


def _verdict(report: Report) -> str:
    """The last line. Of a part it says how much of the suite that is, and nothing of the platform."""
    counts = Counter(result.verdict for result in report.results)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    where = f"at world size {world_sizes(report)} on {report.device or '?'}"
    where += f", run {report.repeat} times" if report.repeat > 1 else ""
    if report.conforms is None:
        others = len(report.ran) - len(report.asked)
        needed = f", with {others} that they rest on" if others else ""
        return f"{report.platform} {where}, {part(report)} ({told}{needed}). A part of the suite is no verdict."
    return f"{report.platform} {'conforms' if report.conforms else 'does not conform'} {where}: {told}."


def listing() -> str:
    """Every requirement as a table in Markdown, by part of the protocol: what the documentation prints."""
    ports: dict[str, list[str]] = {}
    for r in requirements().values():
        needs = ", ".join(c.value for c in r.capabilities) or "none"
        ranks = f" From {r.min_ranks} ranks." if r.min_ranks > 1 else ""
        ports.setdefault(r.port, []).append(f"| `{r.id}` | {r.level.value} | {needs} | {_cell(r.demand)}{ranks} |")
    parts = [
        f"### {port[0].upper()}{port[1:]}\n\n| id | level | capabilities | demand |\n|---|---|---|---|\n"
        + "\n".join(rows)
        for port, rows in ports.items()
    ]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(id: str, results: Sequence[Result], behind: Counter[tuple[str, int]]) -> str:
    blocked = max(behind[(id, r.ranks)] for r in results)
    tail = f" [blocks {blocked} more]" if blocked else ""
    return f"  {id} (world size {_sizes(results)}): {results[0].message}{tail}"


def _measured(result: Result) -> str:
    return result.message if result.verdict is Verdict.MEASURED else f"not measured: {result.message}"


def _sizes(results: Sequence[Result]) -> str:
    return _listed([r.ranks for r in results])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _by_id(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.id, []).append(result)
    return found
