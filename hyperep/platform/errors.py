# SPDX-License-Identifier: Apache-2.0
"""The errors that the platform layer raises; each one carries the value, the rule and the way out."""

from __future__ import annotations

from typing import Any

__all__ = [
    "PlatformBroken",
    "PlatformConflict",
    "PlatformError",
    "PlatformNotFound",
    "PlatformNotViable",
    "PlatformPassedOver",
    "RankFailure",
    "UnsupportedCapability",
]


class PlatformError(RuntimeError):
    """Base of everything that can go wrong between hyperep and a platform."""


class PlatformNotFound(PlatformError, LookupError):
    """No installed distribution registers a platform of that name, or none can be chosen."""


class PlatformNotViable(PlatformError):
    """The platform is installed, but its framework or its device is missing here."""


class PlatformBroken(PlatformError):
    """The platform's own code failed while it was looked at; the message holds its traceback."""


class PlatformConflict(PlatformError):
    """Two distributions register a platform under one name."""


class PlatformPassedOver(UserWarning):
    """A platform was chosen automatically although another one, which cannot be used here, might have been meant."""


class RankFailure(PlatformError):
    """One rank of a launch failed, died or hung; the message names it, and says in a line how each other one ended."""

    def __init__(self, message: str, *, details: str = "", rank: int | None = None, ends: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.details = details or message
        """All that is known: whole tracebacks, and where every thread of every rank stood."""
        self.rank = rank
        """The rank that failed first; ``None`` where none failed by itself, as at a deadline."""
        self.ends = ends
        """How each rank ended (:class:`hyperep.launch.failure.RankEnd`), the first one at fault first."""


class UnsupportedCapability(PlatformError, NotImplementedError):
    """The platform declares that it cannot do what was asked."""

    def __init__(self, platform: str, capability: object, hint: str = "") -> None:
        self.platform = platform
        self.capability = capability
        self.hint = hint
        name = getattr(capability, "value", capability)
        super().__init__(f"platform {platform!r} does not support {name}" + (f": {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        # RuntimeError would be rebuilt from its message alone; ranks send their errors as pickles.
        return type(self), (self.platform, self.capability, self.hint)
