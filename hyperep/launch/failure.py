# SPDX-License-Identifier: Apache-2.0
"""What went wrong in a world, told with the rank that is the cause first."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.launch.messages import Raised
from hyperep.platform.errors import RankFailure

__all__ = ["End", "RankEnd", "Shortfall", "rank_failure"]

_LINES = 12
"""Lines shown of what the rank at fault left: its traceback, or the end of what it printed."""
_WIDTH = 160
"""Characters shown of what another rank says."""
_OTHERS = 20
"""Other ranks that are shown; more of them say nothing new."""


class End(enum.Enum):
    """How a rank's task ended."""

    STOPPED = "was stopped"
    DIED = "died"
    HUNG = "hung"
    """It runs, and others have waited for it for longer than they may."""
    RAISED = "raised"
    FAILED = "failed"
    """It has returned a result that says so."""
    FINISHED = "finished"
    RUNNING = "still running"


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """What the result of a rank says is wrong: such a rank has done no better than one that raised."""

    summary: str
    place: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank (or the ranks of one process that died) ended."""

    ranks: tuple[int, ...]
    end: End
    at: float = 0.0
    summary: str = ""
    error: Raised | None = None
    result: Any = None
    """What it returned, if it finished."""
    outside: bool = False
    """Whether it was ended by a signal that somebody else must have sent."""
    place: str = ""
    """Where it stood, or where it raised, in one line."""
    stack: str = field(default="", repr=False)
    """Where its threads stood, the end of what it printed, or what its result says."""
    doing: str = ""
    """What it said last that it would do."""

    @property
    def label(self) -> str:
        """``rank 3``, or ``ranks 0, 1`` of one process."""
        return f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"

    @property
    def line(self) -> str:
        """All in one line. If that is too long, it is the summary that is cut, and not the place."""
        head, said = f"{self.label}: {self.end.value}", self.summary.partition("\n")[0]
        place = f": in {self.place}" if self.place else ""
        room = max(20, _WIDTH - len(head) - len(place) - 2)
        said = said if len(said) <= room else said[: room - 3] + "..."
        return head + (f": {said}" if said else "") + place

    @property
    def detail(self) -> str:
        """All that is known beyond the line."""
        known = (self.error.traceback if self.error else self.stack).rstrip()
        doing = f"  its last call: {self.doing}" if self.doing and self.end is not End.FINISHED else ""
        return "\n".join(filter(None, (known, doing)))


def rank_failure(headline: str, ends: Sequence[RankEnd], notes: Mapping[str, str]) -> RankFailure:
    """The error of a run.

    Its message fits on a screen: the rank at fault with the end of its traceback, a line for each other rank, and the
    cause once more at the end, where people look. Its ``details`` are everything.

    Args:
        headline: what to say where no rank failed by itself (a deadline, a scheduler that ended).
        ends: of all ranks, in any order.
        notes: further text, by title, such as the output of auxiliary processes.
    """
    failed = sorted((e for e in ends if e.end not in (End.FINISHED, End.RUNNING)), key=_guilt)
    # Of ranks that only stand somewhere, the one that stands where no other does is most likely the one they wait for.
    same = Counter(e.place for e in ends)
    others = sorted((e for e in ends if e not in failed), key=lambda e: (e.end is End.FINISHED, same[e.place]))
    first = failed[0] if failed else None
    world = sum(len(e.ranks) for e in ends)
    cause = f"{first.label} of {world} {first.end.value}: {first.summary}" if first else headline
    if first and first.place and first.end is not End.RAISED:  # whose traceback follows
        cause += f"; {'in' if first.end is End.FAILED else 'it stood in'} {first.place}"
    ordered = [*failed, *others]
    rest = ordered[1:] if first else ordered
    shown = [e.line for e in rest[:_OTHERS]] + ([f"and {len(rest) - _OTHERS} more"] if len(rest) > _OTHERS else [])
    extra = [f"--- {title}\n{_last_lines(text)}" for title, text in notes.items() if text.strip()]
    message = [cause]
    message += [_last_lines(first.detail)] if first and first.detail else []
    message += [f"--- {line}" for line in shown] + extra
    message += [f"cause: {cause.partition(chr(10))[0]}"]
    details = [cause]
    for end in ordered:
        details.append(f"--- {end.label}: {end.end.value}" + (f": {end.summary}" if end.summary else ""))
        details += [end.detail] if end.detail else []
    details += [f"--- {title}\n{text.rstrip()}" for title, text in notes.items() if text.strip()]
    details.append(message[-1])
    failure = RankFailure(
        "\n".join(message),
        details="\n".join(details),
        rank=first.ranks[0] if first else None,
        ends=tuple(ordered),
    )
    failure.__cause__ = first.error.exception() if first and first.error else None
    return failure


def _guilt(end: RankEnd) -> tuple[int, float]:
    """The smaller, the likelier to be the cause of the rest.

    A rank that raised stays alive and its connections stay up, so it makes no other one die; while peers of a dead
    rank raise, often before its death is seen here. A signal from outside needs no cause among the ranks.
    """
    if end.end is End.STOPPED or end.outside:
        return 0, end.at
    return (2 if end.end in (End.RAISED, End.FAILED) else 1), end.at


def _last_lines(text: str) -> str:
    lines = text.rstrip().splitlines()
    return "\n".join(lines if len(lines) <= _LINES else ["  ...", *lines[-_LINES:]])
