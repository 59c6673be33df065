# SPDX-License-Identifier: Apache-2.0
"""What a requirement is: one demand on a platform, under a stable id."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from hyperep.conformance.case import Case
from hyperep.platform.capabilities import Capability

__all__ = ["Level", "Requirement", "requirement"]


class Level(enum.Enum):
    """How much a requirement matters."""

    CORE = "core"
    """Expert parallelism does not work without it; its capability must not be declared UNSUPPORTED."""
    OPTIONAL = "optional"
    """A platform may declare its capability UNSUPPORTED, and then has to refuse."""
    STRESS = "stress"
    """As optional, and it costs time or memory: sizes and interleavings that ordinary use seldom meets."""
    SPEED = "speed"
    """A measurement beside the platform's own primitives. Whatever comes of it, it is no part of the verdict."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One demand, and the check that every rank runs."""

    id: str
    """Stable, and never given to another demand: reports and expected failures refer to it."""
    demand: str
    """One sentence: what the platform has to do."""
    port: str
    """The part of the protocol that it belongs to."""
    level: Level
    capabilities: tuple[Capability, ...]
    """What a platform must be able to do; if one is UNSUPPORTED, the check must raise UnsupportedCapability."""
    needs: tuple[str, ...]
    """Ids of more basic requirements: if one of them failed, this one is blocked and not run."""
    min_ranks: int
    """The smallest world in which the demand means something."""
    refusable: bool
    """Whether a platform without the capability can be made to refuse; a property such as THREADS cannot."""
    check: Callable[[Case], None] = field(repr=False, compare=False)


def requirement(
    id: str,
    demand: str,
    *,
    port: str,
    level: Level = Level.CORE,
    capabilities: tuple[Capability, ...] = (),
    needs: tuple[str, ...] = (),
    min_ranks: int = 1,
    refusable: bool = True,
) -> Callable[[Callable[[Case], None]], Requirement]:
    """Make a :class:`Requirement` of the function below, which runs on every rank and raises if the demand is not met.

    A check derives all data, also those of other ranks, from its case; so every rank can say what it should receive.
    """

    def decorate(check: Callable[[Case], None]) -> Requirement:
        return Requirement(
            id=id,
            demand=demand,
            port=port,
            level=level,
            capabilities=capabilities,
            needs=needs,
            min_ranks=min_ranks,
            refusable=refusable,
            check=check,
        )

    return decorate
