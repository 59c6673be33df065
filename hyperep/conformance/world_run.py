# SPDX-License-Identifier: Apache-2.0
"""``WorldRun``: the suite on one platform in one world, a requirement at a time, on warm ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from hyperep.conformance.report import Result
from hyperep.conformance.requirement import Level, Requirement
from hyperep.conformance.target import Target
from hyperep.conformance.verdict import Judgement, Verdict, judge, told, unsupported
from hyperep.launch.failure import End, Shortfall
from hyperep.launch.pool import RankPool
from hyperep.platform.errors import RankFailure

__all__ = ["STARTS", "WorldRun"]

_CHECK = "hyperep.conformance.on_rank:check"
STARTS = "WORLD-starts"
"""The requirement that ranks start at all, which every other one needs."""


class WorldRun:
    """Runs requirements on a world of *ranks* ranks of *target*, which is started when it is first needed.

    Args:
        target: the platform.
        ranks: world size.
        seed: of all data.
        deadline: seconds that one requirement may take.
        start_deadline: seconds in which the ranks must have started.
    """

    def __init__(
        self, target: Target, ranks: int, *, seed: int = 0, deadline: float = 60.0, start_deadline: float = 180.0
    ) -> None:
        self.target, self.ranks, self.seed, self.deadline = target, ranks, seed, deadline
        self._pool = RankPool(target.launcher, target.name, ranks, start_deadline=start_deadline)
        self._description: Mapping[str, Any] | None = None
        self._unstarted: RankFailure | None = None
        self._verdicts: dict[str, Verdict] = {}
        self._roots: dict[str, str] = {}  # blocked requirement -> the failed one that it goes back to

    @property
    def description(self) -> Mapping[str, Any]:
        """Name, device and capabilities of the platform, as rank 0 tells.

        Raises:
            RankFailure: the ranks do not start.
        """
        if self._unstarted is not None:
            raise self._unstarted
        if self._description is None:
            try:
                (self._description, *_) = self._pool.run(
                    "hyperep.conformance.on_rank:describe", {}, deadline=self.deadline
                )
            except RankFailure as failure:
                self._unstarted = failure
                raise
        return self._description

    def run(self, requirement: Requirement) -> Result:
        """Check one requirement. Those that it needs are taken into account as far as they were run before."""
        began = time.monotonic()
        judgement = self._verdict_on(requirement)
        if requirement.level is Level.SPEED and judgement.verdict is Verdict.FAILED:
            judgement = Judgement(Verdict.UNMEASURED, judgement.message, judgement.detail)
        reason = self.target.expects_failure(requirement.id, self.ranks)
        if reason is not None and judgement.verdict in (Verdict.FAILED, Verdict.MISSING):
            judgement = Judgement(Verdict.EXPECTED, f"{reason} ({judgement.message})", judgement.detail)
        elif reason is not None and judgement.verdict is Verdict.PASSED:
            judgement = Judgement(
                Verdict.UNEXPECTED, f"declared to fail ({reason}), but it passed; take it out of the spec"
            )
        self._verdicts[requirement.id] = judgement.verdict
        return Result(
            id=requirement.id,
            ranks=self.ranks,
            verdict=judgement.verdict,
            message=judgement.message,
            detail=judgement.detail,
            seconds=round(time.monotonic() - began, 3),
            ratio=None if judgement.ratio is None else round(judgement.ratio, 2),
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is no verdict, but should be known: starts that failed before one that did not."""
        return tuple(
            f"ranks started at another try only, at world size {self.ranks}; before: {reason}"
            for reason in self._pool.failed_starts
        )

    @property
    def printed(self) -> dict[str, str]:
        """What ranks printed by the name of the rank, once they have ended; of ranks that were replaced, all of it."""
        found: dict[str, str] = {}
        for world in self._pool.printed:
            for ranks, text in world.items():
                name = f"world size {self.ranks}, rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                found[name] = found.get(name, "") + text
        return {name: text for name, text in found.items() if text.strip()}

    def close(self) -> None:
        """End the ranks."""
        self._pool.close()

    def __enter__(self) -> WorldRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verdict_on(self, requirement: Requirement) -> Judgement:
        if self.ranks < requirement.min_ranks:
            return Judgement(Verdict.SMALL, f"needs {requirement.min_ranks} ranks")
        if requirement.id != STARTS and self._verdicts.get(STARTS, Verdict.PASSED) is not Verdict.PASSED:
            return self._blocked(requirement, STARTS)
        try:
            supports = self.description["capabilities"]
        except RankFailure as failure:
            return self._rank_failure(failure)
        lacking = unsupported(requirement, supports)
        if lacking and not requirement.refusable:
            return Judgement(Verdict.UNSUPPORTED, f"{', '.join(lacking)} is not declared; nothing to call")
        # What has to be refused needs no capability that is missing, but a platform that works up to there.
        bad = (Verdict.FAILED, Verdict.BLOCKED) if lacking else (Verdict.FAILED, Verdict.BLOCKED, Verdict.MISSING)
        blocking = next((n for n in requirement.needs if self._verdicts.get(n) in bad), None)
        if blocking is not None:
            return self._blocked(requirement, blocking)
        arguments = {
            "requirement": requirement.id,
            "seed": self.seed,
            "ranks": self.ranks,
            "declared": dict(self.target.declared),
        }
        try:
            outcomes = self._pool.run(_CHECK, arguments, deadline=self.deadline, shortfall=_shortfall)
        except RankFailure as failure:
            return self._rank_failure(failure)
        if not _in_step(outcomes):
            self._pool.close()
        return judge(requirement, outcomes, supports)

    def _blocked(self, requirement: Requirement, by: str) -> Judgement:
        root = self._roots[requirement.id] = self._roots.get(by, by)
        return Judgement(Verdict.BLOCKED, f"blocked by {root}")

    def _rank_failure(self, failure: RankFailure) -> Judgement:
        headline, _, rest = failure.details.partition("\n")
        first = failure.ends[0] if failure.ends else None
        if first is not None and first.end is End.FAILED:
            # Not the deadline is the fault, but the rank that raised and left the others waiting.
            headline = f"on {first.label} only, while others wait for it: {first.summary}"
        elif first is not None and first.end is End.RUNNING:
            call = first.doing.partition("\n")[0]
            stands = [f"last call {call}"] * bool(call) + [f"in {first.place.partition(' < ')[0]}"] * bool(first.place)
            headline = f"{headline.removesuffix(f': {_CHECK}')}: {', '.join([f'{first.label} still runs', *stands])}"
        lines = [end.line for end in failure.ends]
        return Judgement(Verdict.FAILED, headline, "\n".join([*lines, rest]))


def _shortfall(outcome: Mapping[str, Any]) -> Shortfall | None:
    """What a failed check says, for the report of a world in which another rank did not end."""
    if outcome.get("outcome") not in ("failed", "refused"):
        return None
    summary = outcome["message"].partition("\n")[0]
    return Shortfall(summary=summary, place=outcome["place"], detail=told(outcome))


def _in_step(outcomes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all ranks have issued the same collectives, so that the next check may use them.

    They have if all finished, or all stopped at one place; else some may wait for what others never sent.
    """
    if all(outcome["outcome"] == "met" for outcome in outcomes):
        return True
    return len({(outcome["outcome"], str(outcome.get("where"))) for outcome in outcomes}) == 1
