# SPDX-License-Identifier: Apache-2.0
"""The report of an audit: pure data, and its form as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform as host
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hyperep
from hyperep.audit.finding import Finding
from hyperep.audit.subject import Subject

__all__ = ["SCHEMA", "AuditReport", "Line", "make_report"]

SCHEMA = 1
"""Version of the JSON's form."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One examination at one number of ranks."""

    examination: str
    ranks: int
    outcome: str
    """``"ok"``, ``"wrong"`` or ``"not examined"``."""
    message: str = ""
    """Why it was not examined, or did not end, in one line."""
    detail: str = ""
    """Tracebacks and stacks."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit found."""

    subject: str
    reference: str | None
    """Where the subject is."""
    platform: str
    claims: Mapping[str, Any]
    versions: Mapping[str, str]
    world_sizes: tuple[int, ...]
    seed: int
    only: tuple[str, ...]
    """Examinations that it was confined to; empty for all."""
    date: str
    machine: str
    seconds: float
    examinations: tuple[Line, ...]
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Plain data; numbers that JSON has not are text."""
        return {"schema": SCHEMA, "clean": self.clean, **_plain(dataclasses.asdict(self))}

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from hyperep.audit.page import fragment

        return fragment(self)


def make_report(
    subject: Subject,
    reference: str | None,
    world_sizes: tuple[int, ...],
    seed: int,
    only: tuple[str, ...],
    seconds: float,
    lines: Sequence[Line],
    findings: Sequence[Finding],
) -> AuditReport:
    """Put a report together."""
    claims = dataclasses.asdict(dataclasses.replace(subject.claims))
    claims["expert"] = {"shapes": dict(subject.claims.expert.shapes)}
    versions = {"hyperep": hyperep.__version__, "NumPy": np.__version__, "Python": host.python_version()}
    return AuditReport(
        subject=subject.name or reference or "layer",
        reference=reference,
        platform=subject.platform,
        claims=claims,
        versions=versions | dict(getattr(subject, "versions", {})),
        world_sizes=world_sizes,
        seed=seed,
        only=only,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        machine=f"{host.system()} {host.machine()}, {os.cpu_count()} CPUs",
        seconds=round(seconds, 1),
        examinations=tuple(lines),
        findings=tuple(findings),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
