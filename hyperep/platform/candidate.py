# SPDX-License-Identifier: Apache-2.0
"""What is known about one platform name after it was looked at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hyperep.platform.errors import PlatformBroken, PlatformConflict, PlatformError, PlatformNotViable
from hyperep.platform.spec import PlatformSpec, Viability

__all__ = ["Candidate", "State"]


class State(enum.Enum):
    """Whether a platform can be used here."""

    VIABLE = "viable"
    NOT_VIABLE = "not viable"
    """Its framework or its device is missing, or it was written for another protocol version."""
    BROKEN = "broken"
    """Its own code failed or breaks a rule of plugins, or two distributions claim its name."""
    BLOCKED = "blocked"
    """Somebody ruled it out; nothing of it was imported."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One platform name, where it comes from, and whether it can be used here."""

    name: str
    state: State
    reason: str
    """Why it is in that state. The first line is a sentence; a traceback may follow."""
    distributions: tuple[str, ...] = ()
    """Name of each distribution that registers the name; more than one is a conflict."""
    versions: tuple[str, ...] = ()
    """Their versions, in the same order."""
    spec: PlatformSpec | None = None
    """What the plugin declares, as far as it could be had."""
    viability: Viability | None = None
    """The probe's answer, if it was asked."""

    @property
    def summary(self) -> str:
        """The first line of the reason."""
        return self.reason.partition("\n")[0]

    @property
    def install_hint(self) -> str:
        """The line that installs what is missing; empty if the plugin names none."""
        return self.spec.install_hint if self.spec else ""

    @property
    def priority(self) -> int:
        """Declared priority; the default one where no spec could be had."""
        return self.spec.priority if self.spec else 0

    def describe(self) -> str:
        """One line for an error message that lists candidates."""
        hint = f" (install: {self.install_hint})" if self.install_hint and self.state is State.NOT_VIABLE else ""
        return f"{self.name}: {self.state.value}" + (f", {self.summary}" if self.summary else "") + hint

    def error(self, asked_by: str = "") -> PlatformError:
        """The error for somebody who asked for this platform although it cannot be used; not for a viable one.

        *asked_by* is put behind the name and tells where the name came from.
        """
        who = f"platform {self.name!r}{asked_by}"
        hint = f"; to install what is missing: {self.install_hint}" if self.install_hint else ""
        match self.state:
            case State.NOT_VIABLE:
                return PlatformNotViable(f"{who} is installed but not viable here: {self.reason}{hint}")
            case State.BLOCKED:
                return PlatformNotViable(f"{who} is blocked: {self.reason}")
            case State.BROKEN if len(self.distributions) > 1:
                return PlatformConflict(f"{who} cannot be used: {self.reason}")
            case State.BROKEN:
                return PlatformBroken(f"{who} is broken: {self.reason}")
        raise AssertionError(f"{who} is {self.state.value}; there is no error to report")
