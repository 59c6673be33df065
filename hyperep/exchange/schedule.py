# SPDX-License-Identifier: Apache-2.0
"""In which order the parts of a layer are sent, computed and brought back, so that the wire is busy meanwhile.

Three parts, with what is on its way after each step; a line is a step::

    step            on its way                  step            on its way
    send 0          0                           compute 1       0 back, 2
    send 1          0, 1                        collect 0       2
    meanwhile       0, 1                        return 1        2, 1 back
    receive 0       1                           receive 2       1 back
    compute 0       1                           compute 2       1 back
    return 0        1, 0 back                   collect 1
    receive 1       0 back                      return 2        2 back
    send 2          0 back, 2                   collect 2

An order is a value: it is the same on every rank, whatever the ranks have to send, and it bounds what is in memory.
Backward has the same order, with cotangents in place of tokens, and the parts the other way round.

Hiding exchanges behind the arithmetic of other parts is the idea of Tutel (arXiv:2206.03382) and of the two batches of
DeepSeek-V3 (arXiv:2412.19437).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Action", "Step", "Steps", "bounds", "follow", "joined", "schedule"]


class Action(enum.StrEnum):
    """What is done with a part."""

    SEND = "send"
    """Begin to send it to where it is computed."""
    MEANWHILE = "meanwhile"
    """Compute what needs nothing of any part."""
    RECEIVE = "receive"
    """Wait until it is here."""
    COMPUTE = "compute"
    """Compute it."""
    RETURN = "return"
    """Begin to send back what came of it."""
    COLLECT = "collect"
    """Wait until that is here, and take it."""


@dataclass(frozen=True)
class Step:
    """One step of a schedule."""

    action: Action
    part: int

    def __str__(self) -> str:
        return f"{self.action} {self.part}"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the actions of a schedule mean in one direction."""

    send: Callable[[int], Any]
    """From a part to what is on its way."""
    receive: Callable[[int, Any], Any]
    """From a part, and what is on its way, to what is here."""
    compute: Callable[[int, Any], Any]
    """From a part, and what is here of it, to what is to go back."""
    give_back: Callable[[int, Any], Any]
    """From a part, and its result, to what is on its way back."""
    collect: Callable[[int, Any], None]
    """Takes a part, and what :attr:`give_back` returned."""
    meanwhile: Callable[[], None]


def schedule(parts: int) -> tuple[Step, ...]:
    """The order of steps for that many *parts*, with never more than two of them on their way, there or back.

    Raises:
        ValueError: there are no parts.
    """
    if parts < 1:
        raise ValueError(f"schedule({parts}): there must be at least one part")
    steps = [(Action.SEND, 0)]
    if parts > 1:
        steps.append((Action.SEND, 1))
    steps.append((Action.MEANWHILE, 0))
    for part in range(parts):
        steps.append((Action.RECEIVE, part))
        if 1 <= part < parts - 1:
            steps.append((Action.SEND, part + 1))
        steps.append((Action.COMPUTE, part))
        if part > 0:
            steps.append((Action.COLLECT, part - 1))
        steps.append((Action.RETURN, part))
    steps.append((Action.COLLECT, parts - 1))
    return tuple(Step(action, part) for action, part in steps)


def follow(order: tuple[Step, ...], steps: Steps) -> None:
    """Do the steps of *order*."""
    meant: dict[Action, Callable[[int, Any], Any]] = {
        Action.RECEIVE: steps.receive,
        Action.COMPUTE: steps.compute,
        Action.RETURN: steps.give_back,
        Action.COLLECT: steps.collect,
    }
    held: dict[int, Any] = {}
    for step in order:
        if step.action is Action.MEANWHILE:
            steps.meanwhile()
        elif step.action is Action.SEND:
            held[step.part] = steps.send(step.part)
        else:
            held[step.part] = meant[step.action](step.part, held.pop(step.part))


def bounds(rows: int, parts: int) -> list[tuple[int, int]]:
    """Where each of *parts* begins and ends among *rows*; some may have none.

    The first and the last are half as large as those between them, of three parts or more: nothing is computed while
    the first is on its way to where it is computed, nor while the last one is on its way back.
    """
    halves = parts if parts < 3 else 2 * parts - 2
    edges = range(parts + 1) if parts < 3 else [0, *range(1, halves, 2), halves]
    return list(itertools.pairwise(rows * edge // halves for edge in edges))


def joined(cuts: list[tuple[int, int]], parts: int) -> list[tuple[int, int]]:
    """The runs of :func:`bounds` joined to fewer *parts*, a divisor of what there are."""
    each = len(cuts) // parts
    return [(cuts[first][0], cuts[first + each - 1][1]) for first in range(0, len(cuts), each)]
