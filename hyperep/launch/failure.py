# SPDX-License-Identifier: Apache-2.0
"""What went wrong in a world, told with the rank that failed first."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.launch.messages import Raised
from hyperep.platform.errors import RankFailure

__all__ = ["End", "RankEnd", "rank_failure"]

_CAUSE_WINDOW = 1.0
"""Seconds within which a death that was noticed after an error is taken for its cause: peers of a dead rank raise at
once, while its own end is seen a moment later. A rank that raised stays alive, so the reverse is rare."""


class End(enum.Enum):
    """How a rank's task ended."""

    FINISHED = "finished"
    RAISED = "raised"
    DIED = "died"
    RUNNING = "still running"


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
    stack: str = field(default="", repr=False)
    """Where its threads stood, or the end of what it printed."""

    @property
    def label(self) -> str:
        """``rank 3``, or ``ranks 0, 1`` of one process."""
        return f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"


def rank_failure(headline: str, ends: Sequence[RankEnd], notes: Mapping[str, str]) -> RankFailure:
    """The error of a run: the first failing rank first, then where every other one stood.

    Args:
        headline: what to say where no rank failed by itself (a deadline, a scheduler that ended).
        ends: of all ranks, in any order.
        notes: further text, by title, such as the output of auxiliary processes.
    """
    failed = sorted((e for e in ends if e.end in (End.RAISED, End.DIED)), key=_order)
    others = [e for e in ends if e not in failed]
    first = failed[0] if failed else None
    world = sum(len(e.ranks) for e in ends)
    lines = [f"{first.label} of {world} {first.end.value}: {first.summary}" if first else headline]
    for end in (*failed, *others):
        detail = end.error.traceback if end.error else end.stack
        lines.append(
            f"--- {end.label}: {end.end.value}" + (f": {end.summary}" if end.summary and end is not first else "")
        )
        lines += [detail.rstrip()] if detail else []
    lines += [f"--- {title}\n{text.rstrip()}" for title, text in notes.items() if text.strip()]
    failure = RankFailure("\n".join(lines), rank=first.ranks[0] if first else None, ends=(*failed, *others))
    failure.__cause__ = first.error.exception() if first and first.error else None
    return failure


def _order(end: RankEnd) -> float:
    return end.at - _CAUSE_WINDOW if end.end is End.DIED else end.at
