# SPDX-License-Identifier: Apache-2.0
"""Which installed distributions say that they supply a platform; reads metadata and imports nothing of theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from hyperep.platform.hookspecs import ENTRY_POINT_GROUP

__all__ = ["Origin", "discover"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One place that a platform comes from: an entry point of a distribution, or a call of the running program."""

    name: str
    """Name of the platform: the entry point's name."""
    distribution: str
    """Name of the distribution; empty for a platform that the program registered itself."""
    version: str
    """Version of the distribution; empty where there is none."""
    value: str
    """What the entry point refers to, for people to read: ``"package.spec"``."""
    load: Callable[[], object]
    """Import the plugin; runs the plugin's code and may raise anything."""

    def __str__(self) -> str:
        who = f"{self.distribution} {self.version}".strip() or "the running program"
        return f"{who} ({self.value})"


def discover() -> list[Origin]:
    """Return an origin per entry point of the group ``hyperep.platforms`` on ``sys.path``.

    A distribution that lies on the path twice (a source tree with its build metadata, beside the installed one) counts
    once, and the first one wins, as it does for ``import``. Nothing is imported, so nothing of a plugin can fail here.
    """
    origins: list[Origin] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        entry_points = distribution.entry_points.select(group=ENTRY_POINT_GROUP)
        if not entry_points:
            continue
        name, version = _identity(distribution)
        normalised = re.sub(r"[-_.]+", "-", name).lower()
        if normalised in seen:
            continue
        seen.add(normalised)
        origins += [
            Origin(name=e.name, distribution=name, version=version, value=e.value, load=e.load) for e in entry_points
        ]
    return origins


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version, also for a distribution whose METADATA file is missing or has neither."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(re.findall(r"^(Name|Version):[ \t]*(.+?)[ \t]*$", text, flags=re.MULTILINE))
    if "Name" in fields:
        return fields["Name"], fields.get("Version", "")
    # The folder is called NAME-VERSION.dist-info; a distribution without metadata must still not vanish.
    path = str(getattr(distribution, "_path", "unknown"))
    stem = re.sub(r"\.(dist|egg)-info$", "", re.split(r"[\\/]", path.rstrip("/"))[-1])
    folder_name, _, folder_version = stem.partition("-")
    return folder_name, folder_version
