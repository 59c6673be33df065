# SPDX-License-Identifier: Apache-2.0
"""Ranks that examine: threads of this process, or warm processes that are replaced when one hangs or dies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from hyperep.audit.observation import Observed
from hyperep.audit.on_rank import examine
from hyperep.audit.subject import Subject
from hyperep.conformance.target import find_target
from hyperep.launch import Launcher, RankProcess
from hyperep.launch.failure import End, Shortfall
from hyperep.launch.pool import RankPool
from hyperep.launch.steps import step_limit
from hyperep.platform.errors import RankFailure

__all__ = ["PooledRanks", "Ranks", "ranks_of"]

_START = 180.0
"""Seconds in which ranks must have started."""


class Ranks(Protocol):
    """Some ranks."""

    ranks: int

    def observe(self, **arguments: Any) -> Observed:
        """Run :func:`hyperep.audit.on_rank.examine` on all of them."""
        ...


@contextmanager
def ranks_of(subject: Subject, reference: str | None, ranks: int, deadline: float) -> Iterator[Ranks]:
    """The ranks that a subject runs on, ended at the end.

    Raises:
        PlatformError: its platform cannot be used here.
        ValueError: the subject cannot travel to processes of their own.
    """
    target = find_target(subject.platform)
    if target.launcher.threads:
        yield _Threads(target.launcher, subject, ranks, deadline)
        return
    if reference is None and getattr(type(subject), "__module__", "") == "__main__":
        raise ValueError("a subject of __main__ cannot be imported by other processes; put it into a module")
    given = subject if reference is None else reference
    with RankPool(target.launcher, target.name, ranks, start_deadline=_START) as pool:
        yield PooledRanks(pool, given, ranks, deadline)


class _Threads:
    def __init__(self, launcher: Launcher, subject: Subject, ranks: int, deadline: float) -> None:
        self.ranks = ranks
        self._launcher, self._subject, self._deadline = launcher, subject, deadline

    def observe(self, **arguments: Any) -> Observed:
        everyone = RankProcess(ranks=tuple(range(self.ranks)))
        try:
            with step_limit(self._deadline):
                results = self._launcher.host(
                    everyone, lambda platform: examine(platform, subject=self._subject, **arguments), ""
                )
        except RankFailure as failure:
            return _failed(self.ranks, failure)
        return _observed(self.ranks, results)


class PooledRanks:
    """Warm processes.

    Args:
        pool: of them.
        subject: what they examine, or where it is.
        ranks: how many.
        deadline: seconds that an examination may take.
    """

    def __init__(self, pool: RankPool, subject: Any, ranks: int, deadline: float) -> None:
        self.ranks = ranks
        self._pool, self._subject, self._deadline = pool, subject, deadline
        self._worlds = -1

    def observe(self, **arguments: Any) -> Observed:
        """Run an examination; see :class:`Ranks`."""
        try:
            self._prepare()
            results = self._pool.run(
                "hyperep.audit.on_rank:examine",
                {"subject": self._subject, **arguments},
                deadline=self._deadline,
                shortfall=_shortfall,
            )
        except RankFailure as failure:
            self._end()
            return _failed(self.ranks, failure)
        if any(result["outcome"] == "raised" for result in results):
            self._end()  # ranks may have stopped at different places
        return _observed(self.ranks, results)

    def _end(self) -> None:
        self._pool.close()
        self._worlds = -1

    def _prepare(self) -> None:
        """Let new ranks import what they need: that takes its time on a busy machine, and is no part of a deadline."""
        if self._worlds != self._pool.worlds_made:
            self._pool.run("hyperep.audit.on_rank:prepare", {"subject": self._subject}, deadline=_START)
            self._worlds = self._pool.worlds_made


def _shortfall(result: Mapping[str, Any]) -> Shortfall | None:
    """What an error of the layer says, for the report of a world in which another rank did not end."""
    if result["outcome"] != "raised":
        return None
    return Shortfall(summary=result["message"], place=result["where"], detail=result["traceback"])


def _observed(ranks: int, results: Sequence[Mapping[str, Any]]) -> Observed:
    raised = [(rank, result) for rank, result in enumerate(results) if result["outcome"] == "raised"]
    if raised:
        first = raised[0][1]
        who = (
            "" if len(raised) == ranks else f" on rank{'s' * (len(raised) > 1)} {', '.join(str(r) for r, _ in raised)}"
        )
        return Observed(
            ranks=ranks,
            outcome="raised",
            message=f"{first['message']}{who}",
            action=first["action"],
            places=tuple(f"rank {r}: {result['where']}" for r, result in raised),
            detail=first["traceback"],
        )
    lacking = next((r for r in results if r["outcome"] == "not offered"), None)
    if lacking is not None:
        return Observed(ranks=ranks, outcome="not offered", message=lacking["message"])
    return Observed(ranks=ranks, outcome="done", found=tuple(result["found"] for result in results))


def _failed(ranks: int, failure: RankFailure) -> Observed:
    """Ranks that did not end, or not by themselves."""
    places = tuple(_place(end) for end in sorted(failure.ends, key=lambda end: end.ranks))
    first = failure.ends[0] if failure.ends else None
    waiting = [end for end in failure.ends if end.end in (End.RUNNING, End.HUNG)]
    action = next((end.doing for end in (*waiting, *failure.ends) if end.doing), "") or _in_stacks(failure)
    if first is not None and first.end in (End.FAILED, End.RAISED):
        # Not the deadline is the fault, but the rank that raised and left the others waiting.
        message = f"{first.summary} on {first.label}" + (", while others wait for it" if waiting else "")
        return Observed(
            ranks=ranks, outcome="raised", message=message, action=action, places=places, detail=failure.details
        )
    died = any(end.end in (End.DIED, End.STOPPED) for end in failure.ends)
    message = failure.details.partition("\n")[0]
    outcome = "died" if died else "hung"
    return Observed(ranks=ranks, outcome=outcome, message=message, action=action, places=places, detail=failure.details)


def _in_stacks(failure: RankFailure) -> str:
    """What ranks that are threads of this process were about to do: the innermost action in a stack."""
    verbs = ("forward", "backward", "finish", "step", "save", "load", "norm", "gradients", "weights")
    return next((verb for end in failure.ends for verb in verbs if f"in _{verb}\n" in end.stack), "build")


def _place(end: Any) -> str:
    if end.end is End.FINISHED:
        return f"{end.label}: is done"
    said = ", ".join(filter(None, [end.doing and f"in {end.doing}", end.place or end.summary.partition("\n")[0]]))
    return f"{end.label}: {said or end.end.value}"
