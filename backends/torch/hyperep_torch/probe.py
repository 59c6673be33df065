# SPDX-License-Identifier: Apache-2.0
"""Whether PyTorch can be used here. Imports it, starts nothing."""

from __future__ import annotations

import importlib.util

from hyperep.platform.spec import Viability

__all__ = ["MINIMUM_VERSION", "probe"]

MINIMUM_VERSION = (2, 6)
"""What the platform needs. Styles and layers in PyTorch's own words need more, for which the metadata asks."""


def probe() -> Viability:
    """Look for a PyTorch that is new enough and can communicate.

    An error while PyTorch is imported is not caught: a broken installation must not pass for a missing one.
    """
    if importlib.util.find_spec("torch") is None:
        return Viability.no("torch is not installed; pip install torch")
    import torch

    framework = f"torch {torch.__version__}"
    if _version(torch.__version__) < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        return Viability(False, f"{framework} is too old; pip install 'torch>={needed}'", framework)
    if not torch.distributed.is_available():
        return Viability(False, f"{framework} was built without torch.distributed", framework)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = (
        f"{devices} CUDA device(s), the default, and the CPU" if devices else "no CUDA device; the default is the CPU"
    )
    return Viability.yes(f"{framework}; {found}", framework=framework)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
