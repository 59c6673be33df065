# SPDX-License-Identifier: Apache-2.0
"""Which processes make a world: what a launcher says, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Auxiliary", "LaunchPlan", "RankProcess"]


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """A process to start, and the ranks that live in it: one, or several where ranks are threads."""

    ranks: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set on top of the parent's."""


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A process that ranks need beside them, such as a scheduler: started before them and ended after them."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The processes of one launch."""

    processes: tuple[RankProcess, ...]
    auxiliaries: tuple[Auxiliary, ...] = ()
