# SPDX-License-Identifier: Apache-2.0
"""From what the ranks report to a verdict on a requirement."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperep.conformance.requirement import Level, Requirement

__all__ = ["CONFORMING", "WORST_FIRST", "Judgement", "Verdict", "judge", "line", "told", "unsupported"]


class Verdict(enum.Enum):
    """What became of a requirement."""

    PASSED = "passed"
    UNSUPPORTED = "unsupported"
    """Its capability is declared UNSUPPORTED, and the platform refused as it must."""
    EXPECTED = "expected failure"
    """It failed, as the plugin says it does, for the reason that the plugin gives."""
    SMALL = "world too small"
    """It means nothing in a world of so few ranks; not run."""
    FAILED = "failed"
    MISSING = "missing"
    """Its capability is declared UNSUPPORTED, but expert parallelism does not work without it."""
    BLOCKED = "blocked"
    """Something more basic failed; not run."""
    MEASURED = "measured"
    """A measurement of speed, which says how much and not whether."""
    UNMEASURED = "not measured"
    """A measurement of speed that failed; no fault of its own, since what is asked for elsewhere is asked for there."""
    UNEXPECTED = "unexpected pass"
    """The plugin says that it fails, and it does not: the declaration is out of date."""


CONFORMING = frozenset(Verdict) - {Verdict.FAILED, Verdict.MISSING, Verdict.BLOCKED, Verdict.UNEXPECTED}
"""A platform conforms if it got no other verdict."""


WORST_FIRST = (
    Verdict.FAILED,
    Verdict.MISSING,
    Verdict.UNEXPECTED,
    Verdict.BLOCKED,
    Verdict.EXPECTED,
    Verdict.UNMEASURED,
    Verdict.MEASURED,
    Verdict.PASSED,
    Verdict.UNSUPPORTED,
    Verdict.SMALL,
)
"""What stands for several verdicts on one requirement: the first of these."""


@dataclass(frozen=True)
class Judgement:
    """A verdict and its reason."""

    verdict: Verdict
    message: str = ""
    """One line."""
    detail: str = ""
    """Tracebacks, splits, stacks."""
    ratio: float | None = None
    """What was measured, on the slowest rank."""


def unsupported(requirement: Requirement, supports: Mapping[str, str]) -> list[str]:
    """The capabilities of a requirement that the platform declares UNSUPPORTED."""
    return [c.value for c in requirement.capabilities if supports.get(c.value, "unsupported") == "unsupported"]


def judge(requirement: Requirement, outcomes: Sequence[Mapping[str, Any]], supports: Mapping[str, str]) -> Judgement:
    """The verdict on what each rank made of the check; see :mod:`hyperep.conformance.on_rank`.

    Args:
        requirement: the one that was checked.
        outcomes: by rank.
        supports: capability -> support, as the platform declares.
    """
    lacking = unsupported(requirement, supports)
    failed = [(rank, o) for rank, o in enumerate(outcomes) if o["outcome"] == "failed"]
    refused = [(rank, o) for rank, o in enumerate(outcomes) if o["outcome"] == "refused"]
    if failed:
        rank, outcome = failed[0]
        message = f"{_ranks([r for r, _ in failed], len(outcomes))}{outcome['message']}"
        if lacking:
            message = f"{lacking[0]} is declared UNSUPPORTED, so this must raise UnsupportedCapability; {message}"
        return Judgement(Verdict.FAILED, _one_line(message), _detail(rank, outcomes))
    if not lacking:
        if not refused and requirement.level is Level.SPEED:
            slowest = max(outcomes, key=lambda outcome: outcome["ratio"])
            return Judgement(Verdict.MEASURED, slowest["message"], ratio=slowest["ratio"])
        if not refused:
            return Judgement(Verdict.PASSED)
        rank, outcome = refused[0]
        supported = f"{outcome['capability']} is declared {supports.get(outcome['capability'], 'unsupported').upper()}"
        who = _ranks([r for r, _ in refused], len(outcomes))
        return Judgement(Verdict.FAILED, _one_line(f"{who}{outcome['message']} ({supported})"), _detail(rank, outcomes))
    if len(refused) < len(outcomes):
        message = (
            f"{lacking[0]} is declared UNSUPPORTED, so this must raise UnsupportedCapability, but nothing was raised"
        )
        return Judgement(Verdict.FAILED, message, _lines(outcomes))
    wrong = sorted({o["capability"] for _, o in refused} - set(lacking))
    if wrong:
        rank, outcome = refused[0]
        message = f"{lacking} are declared UNSUPPORTED, but what was refused is {wrong}"
        return Judgement(Verdict.FAILED, message, _detail(rank, outcomes))
    if requirement.level is Level.CORE:
        return Judgement(Verdict.MISSING, f"needs {', '.join(lacking)}, declared UNSUPPORTED")
    return Judgement(Verdict.UNSUPPORTED, f"refused as declared: {', '.join(lacking)}")


def _ranks(ranks: Sequence[int], world: int) -> str:
    if len(ranks) == world:
        return ""
    return f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} only: "


def _one_line(message: str) -> str:
    return message.partition("\n")[0]


def line(outcome: Mapping[str, Any]) -> str:
    """What became of the check on one rank: the verdict, what was found, and the place in the author's files."""
    if outcome["outcome"] == "met":
        return "passed"
    found = _one_line(outcome["message"])
    place = outcome.get("place", "")
    return f"{outcome['outcome']}: {found}" + (f": in {place}" if place else "")


def told(outcome: Mapping[str, Any]) -> str:
    """All that is known of an outcome: the values of the check's inputs, the last call, the traceback."""
    known = {**outcome["notes"], "its last call": outcome.get("call", "")}
    notes = "".join(f"  {key}: {value}\n" for key, value in known.items() if value)
    return notes + outcome["traceback"].rstrip()


def _lines(outcomes: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"rank {rank}: {line(outcome)}" for rank, outcome in enumerate(outcomes))


def _detail(rank: int, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """A line for each rank, then everything about the first one at fault."""
    return f"{_lines(outcomes)}\n--- rank {rank}\n{told(outcomes[rank])}"
