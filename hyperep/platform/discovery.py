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
    once, and the first one wins, as it does for ``import``. Nothing is imported; entry points that cannot be
    read become an origin whose ``load`` says so.
    """
    origins: list[Origin] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if ENTRY_POINT_GROUP not in _text(distribution, "entry_points.txt"):
            continue
        name, version = _identity(distribution)
        normalised = re.sub(r"[-_.]+", "-", name).lower()
        if normalised in seen:
            continue
        seen.add(normalised)
        origins += _origins(distribution, name, version)
    return origins


def _origins(distribution: metadata.Distribution, name: str, version: str) -> list[Origin]:
    try:
        return [
            Origin(name=e.name, distribution=name, version=version, value=e.value, load=e.load)
            for e in distribution.entry_points.select(group=ENTRY_POINT_GROUP)
        ]
    except Exception as error:
        fault = ValueError(f"entry_points.txt of {name} {version} cannot be read: {type(error).__name__}: {error}")

        def load() -> object:
            raise fault from None

        # Which platform it would have supplied is unknown; under its own name it is at least seen.
        return [Origin(name=name, distribution=name, version=version, value="entry_points.txt", load=load)]


def _text(distribution: metadata.Distribution, file: str) -> str:
    """Read a file of the metadata; one that is absent, or is no text, is empty."""
    try:
        return distribution.read_text(file) or ""
    except UnicodeDecodeError:
        return ""


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version, also for a distribution whose METADATA file is missing or has neither."""
    text = _text(distribution, "METADATA") or _text(distribution, "PKG-INFO")
    fields = dict(re.findall(r"^(Name|Version):[ \t]*(.+?)[ \t]*$", text, flags=re.MULTILINE))
    if "Name" in fields:
        return fields["Name"], fields.get("Version", "")
    # The folder is called NAME-VERSION.dist-info; a distribution without metadata must still not vanish.
    path = str(getattr(distribution, "_path", "unknown"))
    stem = re.sub(r"\.(dist|egg)-info$", "", re.split(r"[\\/]", path.rstrip("/"))[-1])
    folder_name, _, folder_version = stem.partition("-")
    return folder_name, folder_version
