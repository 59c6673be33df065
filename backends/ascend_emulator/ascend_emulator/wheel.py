# SPDX-License-Identifier: Apache-2.0
"""What the installed torch_npu wheel needs, found out without importing it (it cannot be imported without CANN)."""

import importlib.util
import subprocess
from pathlib import Path

CANN_PREFIXES = ("acl", "Hccl", "Msprof", "rtDev", "rtFunction", "rtGet", "rtKernel")


def wheel_folder() -> Path:
    """The folder of the installed torch_npu package.

    Raises:
        ModuleNotFoundError: torch_npu is not installed for this Python.
    """
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "torch_npu is not installed for this Python; install torch_npu and the torch of the same version"
        )
    return Path(spec.origin).parent


def linked_libraries(wheel: Path) -> list[Path]:
    """The shared libraries of the wheel that are loaded by `import torch_npu`."""
    return [wheel / "lib" / "libtorch_npu.so", wheel / "lib" / "libnpu_profiler.so", *sorted(wheel.glob("_C*.so"))]


def undefined_cann_symbols(wheel: Path) -> set[str]:
    """The names of CANN's functions that the wheel is linked against, so that it cannot be loaded without them."""
    names: set[str] = set()
    for library in linked_libraries(wheel):
        table = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True, timeout=120
        ).stdout
        names.update(line.split()[-1].partition("@")[0] for line in table.splitlines() if line.strip())
    return {name for name in names if name.startswith(CANN_PREFIXES)}
