# SPDX-License-Identifier: Apache-2.0
"""Whether MindSpore can be used here. Imports it, starts nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from hyperep.platform.spec import Viability

__all__ = ["TESTED_VERSION", "is_emulated", "probe"]

TESTED_VERSION = (2, 10)


def is_emulated() -> bool:
    """Whether an Ascend device here is one of ``backends/ascend_emulator``, the project's test equipment."""
    return bool(os.environ.get("EMULATED_NPUS"))


def probe() -> Viability:
    """Look for a MindSpore of the version that this package was written for.

    An error while MindSpore is imported is not caught: a broken installation must not pass for a missing one.
    """
    if importlib.util.find_spec("mindspore") is None:
        return Viability.no("mindspore is not installed; pip install 'mindspore>=2.10,<2.11' 'numpy<2'")
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        # Looked at first, because the import of MindSpore fails on it with a message about something else.
        return Viability.no(f"mindspore does not work with numpy {numpy_version}; pip install 'numpy<2'")
    import mindspore

    framework = f"mindspore {mindspore.__version__}"
    if _version(mindspore.__version__) != TESTED_VERSION:
        wanted = ".".join(map(str, TESTED_VERSION))
        return Viability(False, f"{framework} is not {wanted}; pip install 'mindspore~={wanted}.0'", framework)
    device = mindspore.get_context("device_target")
    kind = f"emulated {device}" if device == "Ascend" and is_emulated() else device
    return Viability.yes(f"{framework}; the default device is {kind}", framework=framework)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
