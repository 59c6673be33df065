# SPDX-License-Identifier: Apache-2.0
"""The pluggy hooks that a platform plugin implements."""

from __future__ import annotations

import pluggy

from hyperep.platform.spec import PlatformSpec

__all__ = ["ENTRY_POINT_GROUP", "PROJECT", "hookimpl", "hyperep_platform_spec"]

PROJECT = "hyperep"
ENTRY_POINT_GROUP = "hyperep.platforms"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def hyperep_platform_spec() -> PlatformSpec:  # type: ignore[empty-body]
    """Return the description of the platform that this plugin supplies. Must not import its framework."""
