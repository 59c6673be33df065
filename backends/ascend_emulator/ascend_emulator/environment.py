# SPDX-License-Identifier: Apache-2.0
"""The environment in which a program finds emulated devices."""

import os
from collections.abc import Mapping
from pathlib import Path

from ascend_emulator.build import HOME, LIBRARIES, build

HERE = Path(__file__).parent


def environment(
    devices: int = 8,
    *,
    delay_ms: int = 0,
    deadline_s: int | None = None,
    base: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> dict[str, str]:
    """Environment variables for a Python program, and all processes that it starts, to run on emulated devices.

    Args:
        devices: how many devices there are.
        delay_ms: for how long a stream waits before each copy and each collective.
        deadline_s: after how many seconds a rank that waits for its peers gives up; None leaves the default.
        base: the environment to start from; os.environ if None.
        folder: where builds are kept; a folder in the user's cache if None.
    """
    base = os.environ if base is None else base
    made = dict(base)
    root = build(folder)
    made["LD_LIBRARY_PATH"] = _prepend(str(root / LIBRARIES), base.get("LD_LIBRARY_PATH"))
    # Without these torch_npu prints a warning to stdout, where programs print their results.
    made["ASCEND_HOME_PATH"] = str(root / HOME)
    made["ASCEND_OPP_PATH"] = str(root / HOME / "opp")
    # `autoload` holds a sitecustomize module, which Python imports at its start: it sees to it that whoever imports
    # torch_npu, by whatever way, gets the kernels too. `cann_python` holds the package that MindSpore looks for.
    folders = (HERE / "autoload", HERE.parent, HERE / "cann_python")
    made["PYTHONPATH"] = _prepend(os.pathsep.join(map(str, folders)), base.get("PYTHONPATH"))
    made["EMULATED_NPUS"] = str(devices)
    made["EMULATED_NPU_DELAY_MS"] = str(delay_ms)
    if deadline_s is not None:
        made["EMULATED_NPU_DEADLINE_S"] = str(deadline_s)
    return made


def _prepend(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first
