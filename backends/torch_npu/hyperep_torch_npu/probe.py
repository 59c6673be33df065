# SPDX-License-Identifier: Apache-2.0
"""Whether an Ascend device can be used here. Imports PyTorch only where that can succeed; starts nothing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os

from hyperep.platform.spec import Viability

__all__ = ["CANN_LIBRARIES", "is_emulated", "probe"]

CANN_LIBRARIES = ("libhccl.so", "libascendcl.so")
"""Of CANN; without them the import of torch_npu fails, and with it that of torch, which imports torch_npu."""


def is_emulated() -> bool:
    """Whether the devices here are those of ``backends/ascend_emulator``, the project's test equipment."""
    return bool(os.environ.get("EMULATED_NPUS"))


def probe() -> Viability:
    """Look for torch_npu, the torch that it belongs to, CANN, and a device that answers.

    An error while torch_npu is imported in spite of all that is not caught: a broken installation must not pass for a
    missing one.
    """
    for package in ("torch", "torch_npu"):
        if importlib.util.find_spec(package) is None:
            return Viability.no(f"{package} is not installed; pip install torch torch_npu, of the same version")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "torch_npu")}
    framework = f"torch {versions['torch']}, torch_npu {versions['torch_npu']}"
    if _minor(versions["torch"]) != _minor(versions["torch_npu"]):
        return Viability(False, f"{framework} do not go together; install both of the same version", framework)
    missing = [library for library in CANN_LIBRARIES if not _loads(library)]
    if missing:
        hint = "install CANN and source its set_env.sh"
        return Viability(False, f"CANN libraries not found ({', '.join(missing)}); {hint}", framework)
    import torch
    import torch_npu  # noqa: F401  (makes torch.npu, where torch does not import it by itself)

    devices = torch.npu.device_count()
    if not devices:
        return Viability(False, "no Ascend device answers: torch.npu.device_count() is 0", framework)
    kind = "emulated device(s)" if is_emulated() else "Ascend device(s)"
    return Viability.yes(f"{framework}; {devices} {kind}", framework=framework)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
