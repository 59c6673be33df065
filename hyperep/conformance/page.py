# SPDX-License-Identifier: Apache-2.0
"""The compatibility matrix of several reports as one HTML page that needs nothing else; its frame is ``page.html``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from hyperep.conformance.catalogue import lacking
from hyperep.conformance.matrix import NOTED, anchor, by_port, cell, counts, head, sign, verdict_on
from hyperep.conformance.report import Report
from hyperep.conformance.text import world_sizes

__all__ = ["as_html"]


def as_html(reports: Sequence[Report]) -> str:
    """The page: the tables of :func:`hyperep.conformance.matrix.as_markdown`, and more.

    It has filters by text, level, capability and verdict, a head that stays in sight, and a link from each failure to
    its message.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError(
            "a matrix needs at least one report; make one with: hyperep conformance run --report FILE.json"
        )
    rows = [
        {
            "id": r.id,
            "demand": r.demand,
            "level": r.level.value,
            "port": r.port,
            "capabilities": [c.value for c in r.capabilities],
            "cells": [_cell(number, report, r.id) for number, report in enumerate(reports)],
        }
        for r in itertools.chain.from_iterable(by_port().values())
    ]
    # No "<" in the script that the data stand in: "</script>" would end it, and "<!--<script>" take its end away.
    data = json.dumps({"platforms": [_platform(r) for r in reports], "rows": rows}).replace("<", "\\u003c")
    frame = resources.files("hyperep.conformance").joinpath("page.html").read_text(encoding="utf-8")
    return frame.replace("@DATA@", data)


def _cell(number: int, report: Report, id: str) -> dict[str, Any]:
    verdict, note = cell(report, id)
    found = {"verdict": verdict.value if verdict else "not run", "sign": sign(report, id), "note": note}
    return found | ({"anchor": anchor(number, id)} if verdict in NOTED else {})


def _whole_verdict(report: Report) -> bool | None:
    """The verdict; ``None`` also for a report of an older suite, which says nothing of some requirements."""
    return None if report.conforms and lacking(report.ran) else report.conforms


def _platform(report: Report) -> dict[str, Any]:
    suite = f"{report.suite} ({report.commit})" if report.commit else report.suite
    sizes = f"world sizes {world_sizes(report)}, seed {report.seed}"
    facts = (report.distribution, report.framework, report.device, sizes, suite, report.machine, report.date)
    return {
        "head": head(report),
        "facts": [fact for fact in facts if fact],
        "verdict": verdict_on(report),
        "class": {True: "passed", False: "failed", None: "partial"}[_whole_verdict(report)],
        "counts": [[verdict.value, number] for verdict, number in counts(report).items()],
    }
