# SPDX-License-Identifier: Apache-2.0
"""The platform that a layer computes with where nobody gave it one: that of its input's device, as a single rank.

A layer by itself communicates with nobody. What does, the styles, take their platform from the mesh.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from hyperep.platform.selection import live_platforms
from hyperep_torch.device import KINDS
from hyperep_torch.groups import SELF
from hyperep_torch.world import World

if TYPE_CHECKING:
    from hyperep_torch.platform import TorchPlatform

__all__ = ["platform_on", "prepare_platform_on"]

_platforms: dict[torch.device, TorchPlatform] = {}


def platform_on(device: torch.device) -> TorchPlatform:
    """The platform on *device*; the same object at every call.

    Raises:
        ValueError: PyTorch alone does not know the kind of device, and no platform for it was made.
    """
    found = _platforms.get(device)
    return _make(device) if found is None else found


def prepare_platform_on(device: torch.device) -> None:
    """Make the platform where that is possible, so that a compiler which traces a forward finds it made."""
    if device not in _platforms and any(kind.type == device.type for kind in KINDS):
        _make(device)


def _make(device: torch.device) -> TorchPlatform:
    """Find or make the platform, once a device."""
    from hyperep_torch.platform import TorchPlatform

    kind = next((kind for kind in KINDS if kind.type == device.type), None)
    if kind is not None:
        world = World(rank=0, size=1, kind=kind, device=device, group=SELF, timeout=timedelta(minutes=10))
        made = TorchPlatform(world)
    else:
        # Another device has kernels of its own, which its plugin's platform knows.
        live = [p for p in live_platforms() if isinstance(p, TorchPlatform) and p.torch_device.type == device.type]
        if not live:
            raise ValueError(
                f"no platform for the device {str(device)!r}; make its platform first, with hyperep.get_platform(name)"
            )
        made = live[0]
    _platforms[device] = made
    return made
