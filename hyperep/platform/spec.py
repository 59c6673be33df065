# SPDX-License-Identifier: Apache-2.0
"""What a plugin says about its platform before anything of the framework is imported: pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hyperep.platform.capabilities import Capability, Support

__all__ = ["API_OLDEST", "API_VERSION", "PlatformSpec", "Viability"]

API_VERSION = 2
"""The newest version of the ``Platform`` protocol; ``docs/platforms.md`` says what each version brought.

A plugin writes numbers into its spec and not this name, which would claim every version to come.
"""
API_OLDEST = 1
"""The oldest version that still runs: a plugin is viable if it knows one from here to ``API_VERSION``."""


@dataclass(frozen=True, kw_only=True)
class PlatformSpec:
    """A platform as its plugin declares it.

    ``factory``, ``probe`` and ``launcher`` are ``"module:name"`` strings, so that describing a platform imports
    nothing; they are resolved when they are first needed.
    """

    name: str
    """Name of the platform; the same as its entry point's."""
    api: tuple[int, int] | None = None
    """The oldest and the newest version of the protocol that the plugin was written for, such as ``(2, 2)``."""
    api_version: int | None = None
    """The one version that it was written for; version 1 asked for this, and it goes in version 3: use ``api``."""
    factory: str
    """``factory(**options) -> Platform`` for the calling rank, joining the launch that this process is part of."""
    probe: str
    """``probe() -> Viability``; may import the framework, must not start anything."""
    description: str = ""
    """One line for people."""
    install_hint: str = ""
    """The line that installs what is missing."""
    priority: int = 0
    """Among several viable platforms the unique highest one is chosen. One of negative priority is for reference: it is
    never chosen by itself while another installed one cannot be used."""
    capabilities: Mapping[Capability, Support] = field(default_factory=dict)
    """What the platform declares on its best device; a platform object may declare less on the one at hand."""
    launcher: str = ""
    """``"module:object"`` of a :class:`hyperep.launch.Launcher`; empty for a platform that is always one rank."""
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    """Conformance requirement id -> why the platform is known to fail it. Strict: passing it is then an error."""

    @property
    def versions(self) -> tuple[int, int]:
        """The oldest and the newest version of the protocol that the plugin was written for, however it says so."""
        return self.api or (self.api_version or 0, self.api_version or 0)


@dataclass(frozen=True)
class Viability:
    """A probe's answer: can this platform be used here, and if not, why not."""

    viable: bool
    reason: str = ""
    """Why not; or, for a viable one, what was found (framework version, device)."""
    framework: str = ""
    """Framework and version, ``"torch 2.13.0"``; empty where none is involved."""

    @classmethod
    def no(cls, reason: str) -> Viability:
        """Not viable, for the given reason."""
        return cls(False, reason)

    @classmethod
    def yes(cls, reason: str = "", *, framework: str = "") -> Viability:
        """Viable; *reason* says what was found."""
        return cls(True, reason, framework)
