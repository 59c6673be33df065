# SPDX-License-Identifier: Apache-2.0
"""Whether a plugin and this core have a version of the platform protocol in common."""

from __future__ import annotations

from hyperep.platform.spec import API_OLDEST, API_VERSION, PlatformSpec

__all__ = ["faults", "told", "why_incompatible"]


def why_incompatible(spec: PlatformSpec, distribution: str) -> str:
    """Why the plugin of *spec* cannot run on this core, with the way out; empty if it can."""
    oldest, newest = spec.versions
    if oldest <= API_VERSION and newest >= API_OLDEST:
        return ""
    newer = "hyperep" if oldest > API_VERSION else distribution or "the plugin"
    return (
        f"written for {told((oldest, newest))} of the platform protocol, while this hyperep supports "
        f"{told((API_OLDEST, API_VERSION))}; install a newer release of {newer}"
    )


def faults(spec: PlatformSpec) -> list[str]:
    """What is wrong with the versions that *spec* declares."""
    if (spec.api is None) == (spec.api_version is None):
        return [
            f"api={spec.api!r} and api_version={spec.api_version!r}: give api alone, the oldest and the newest version "
            f"of the protocol that the plugin was written for, such as api=({API_VERSION}, {API_VERSION})"
        ]
    if spec.api is None:
        return [] if _is_version(spec.api_version) else [f"api_version={spec.api_version!r} must be an int from 1 on"]
    pair: object = spec.api
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_version, pair)) and pair[0] <= pair[1]:
        return []
    return [f"api={pair!r} must be the oldest and the newest version, such as ({API_OLDEST}, {API_VERSION})"]


def told(versions: tuple[int, int]) -> str:
    """``version 2``, or ``versions 1 to 2``."""
    oldest, newest = versions
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"


def _is_version(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
