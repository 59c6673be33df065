# SPDX-License-Identifier: Apache-2.0
"""The loopback platform as a plugin: found by the same entry point as everybody else's."""

from __future__ import annotations

from typing import Any

from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec, Viability

__all__ = ["create", "hyperep_platform_spec", "probe"]


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """Describe the loopback platform."""
    from hyperep.loopback.platform import CAPABILITIES

    return PlatformSpec(
        name="loopback",
        api=(2, 2),
        factory="hyperep.loopback.spec:create",
        probe="hyperep.loopback.spec:probe",
        description="reference platform: NumPy, every rank a thread of one process",
        install_hint="pip install hyperep",
        # Always viable, so it must never win over a framework that somebody took the trouble to install.
        priority=-100,
        capabilities=CAPABILITIES,
        launcher="hyperep.loopback.launch:launcher",
    )


def create(**options: Any) -> Any:
    """Make the platform of a world of one rank; worlds of several are made by :func:`hyperep.loopback.run`."""
    from hyperep.loopback.platform import LoopbackPlatform

    if options:
        raise TypeError(f"platform 'loopback' takes no options, got {sorted(options)}")
    return LoopbackPlatform()


def probe() -> Viability:
    """Say that NumPy is there, as it always is."""
    import numpy

    return Viability.yes("ranks are threads", framework=f"numpy {numpy.__version__}")
