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
from hyperep.launch.failure import End
from hyperep.launch.pool import RankPool
from hyperep.launch.steps import step_limit
from hyperep.platform.errors import RankFailure

__all__ = ["Ranks", "ranks_of"]

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
        yield _Processes(pool, given, ranks, deadline)


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


class _Processes:
    def __init__(self, pool: RankPool, subject: Any, ranks: int, deadline: float) -> None:
        self.ranks = ranks
        self._pool, self._subject, self._deadline = pool, subject, deadline

    def observe(self, **arguments: Any) -> Observed:
        try:
            results = self._pool.run(
                "hyperep.audit.on_rank:examine",
                {"subject": self._subject, **arguments},
                deadline=self._deadline,
                hurry=lambda result: result["outcome"] == "raised",
            )
        except RankFailure as failure:
            return _failed(self.ranks, failure)
        if any(result["outcome"] == "raised" for result in results):
            self._pool.close()  # ranks may have stopped at different places
        return _observed(self.ranks, results)


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
    ends = sorted(failure.ends, key=lambda end: end.ranks)
    # A rank that raised while others wait for it is told as what it is.
    own = [end for end in ends if end.end is End.FINISHED and isinstance(end.result, Mapping)]
    raised = [(end, end.result) for end in own if end.result["outcome"] == "raised"]
    places = tuple(_place(end) for end in ends)
    if raised:
        end, result = raised[0]
        message = f"{result['message']} on {end.label}, while others wait for it"
        return Observed(
            ranks=ranks,
            outcome="raised",
            message=message,
            action=result["action"],
            places=places,
            detail=result["traceback"] + failure.details,
        )
    died = any(end.end in (End.DIED, End.STOPPED) for end in ends)
    message = failure.details.partition("\n")[0]
    action = next((word for end in ends for word in _ACTIONS if f"_{word} (on_rank.py" in end.stack + end.place), "")
    in_stack = next((word for end in ends for word in _ACTIONS if f"in _{word}" in end.stack), action)
    return Observed(
        ranks=ranks,
        outcome="died" if died else "hung",
        message=message,
        action=in_stack or "the call",
        places=places,
        detail=failure.details,
    )


_ACTIONS = ("forward", "backward", "finish", "step", "save", "load", "norm", "gradients", "weights")


def _place(end: Any) -> str:
    if end.end is End.FINISHED:
        return f"{end.label}: is done"
    said = end.place or (end.summary.partition("\n")[0] if end.summary else "")
    return f"{end.label}: {said or end.end.value}"
