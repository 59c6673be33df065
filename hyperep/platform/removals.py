# SPDX-License-Identifier: Apache-2.0
"""What goes in the next version of the platform protocol, and who still uses it.

A removal is announced for a whole version before it happens, by the conformance suite and by ``hyperep doctor``. To
announce one, add a line to ``REMOVALS``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from hyperep.platform.base import PlatformBase
from hyperep.platform.reference import resolve
from hyperep.platform.spec import PlatformSpec

__all__ = ["REMOVALS", "Removal", "class_made_by", "used_by_class", "used_by_spec"]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One thing that goes."""

    member: str
    """``"PlatformSpec.field"`` or ``"Platform.member"``."""
    goes_in: int
    """The first version of the protocol without it."""
    instead: str
    """What to do now, as an order."""

    def announce(self, platform: str) -> str:
        """One sentence for the author of *platform*, who uses it."""
        return f"platform {platform!r} uses {self.member}, which goes in version {self.goes_in}; {self.instead}"


REMOVALS: tuple[Removal, ...] = (
    Removal(
        member="PlatformSpec.api_version",
        goes_in=3,
        instead="give the oldest and the newest version that it was written for, such as api=(1, 2)",
    ),
)
"""Everything that is announced now."""


def used_by_spec(spec: PlatformSpec, removals: Sequence[Removal] = REMOVALS) -> list[Removal]:
    """Those that *spec* sets."""
    defaults = {f"PlatformSpec.{f.name}": (f.name, f.default) for f in dataclasses.fields(spec)}
    return [
        removal
        for removal in removals
        if removal.member in defaults and getattr(spec, defaults[removal.member][0]) != defaults[removal.member][1]
    ]


def used_by_class(kind: type, removals: Sequence[Removal] = REMOVALS) -> list[Removal]:
    """Those that a platform's class defines, and has not only inherited from ``PlatformBase``."""
    own = {name for base in kind.__mro__ if base not in PlatformBase.__mro__ for name in vars(base)}
    return [removal for removal in removals if removal.member.removeprefix("Platform.") in own]


def class_made_by(spec: PlatformSpec) -> type | None:
    """The class of the platforms that the factory of *spec* says to return; ``None`` if it does not say.

    Imports the factory's module, and so its framework; makes no platform.
    """
    try:
        found = typing.get_type_hints(resolve(spec.factory)).get("return")
    except Exception:  # the plugin's own code; what is wrong with it is told where it is used
        return None
    return found if isinstance(found, type) and found is not typing.Any else None
