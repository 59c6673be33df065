# SPDX-License-Identifier: Apache-2.0
"""What the installed frameworks need of CANN, found out without importing them (they may not be importable without)."""

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CANN_NAMES = re.compile(r"acl|Hccl|Msprof|hal[A-Z]|rt[A-Z]|_ZNK?2ge")
"""How names of CANN's functions begin; those of its graph engine are mangled C++."""

HCCL_NAME = re.compile(rb"\0(Hc(?:cl|om)[A-Z][A-Za-z]+)(?=\0)")
"""A name of HCCL as a string of its own in a library, which looks functions up by such names."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A framework's wheel, as far as it is linked against CANN."""

    name: str
    libraries: tuple[Path, ...]
    """The shared libraries that are linked against CANN."""
    neighbours: tuple[Path, ...] = ()
    """Other libraries of the wheel, which define some of what those do not."""
    looking_up: tuple[Path, ...] = ()
    """Libraries that look all of HCCL's functions up by name, and do not start if one is missing."""

    def wanted(self) -> set[str]:
        """The names of CANN's functions without which it cannot be loaded."""
        undefined = symbols(self.libraries, "--undefined-only") - symbols(self.neighbours, "--defined-only")
        looked_up = {name.decode() for path in self.looking_up for name in HCCL_NAME.findall(path.read_bytes())}
        return {name for name in undefined if CANN_NAMES.match(name)} | looked_up


def torch_npu() -> Wheel | None:
    """The torch_npu that is installed for this Python, if there is one that has its torch."""
    folder = _folder("torch_npu")
    if folder is None or _folder("torch") is None:
        return None
    lib = folder / "lib"
    return Wheel(
        name="torch_npu",
        libraries=(lib / "libtorch_npu.so", lib / "libnpu_profiler.so", *sorted(folder.glob("_C*.so"))),
    )


def mindspore() -> Wheel | None:
    """The MindSpore that is installed for this Python."""
    folder = _folder("mindspore")
    if folder is None:
        return None
    plugin = folder / "lib" / "plugin"
    ascend = ("mindspore_ascend_res_manager", "mindspore_graph_ir", "hccl_plugin", "d_collective")
    libraries = (
        *(plugin / "libmindspore_ascend.so.2", plugin / "libmindspore_ops_ascend.so"),
        *(plugin / "ascend" / f"lib{name}.so" for name in ascend),
        *sorted(plugin.rglob("libshmem.so")),
    )
    return Wheel(
        name="mindspore",
        libraries=libraries,
        neighbours=(*sorted((folder / "lib").glob("*.so*")), *libraries),
        looking_up=tuple(path for path in libraries if path.stem.endswith(("res_manager", "hccl_plugin"))),
    )


def installed() -> list[Wheel]:
    """The wheels of this Python that the emulated device is for.

    Raises:
        ModuleNotFoundError: there is none.
    """
    found = [wheel for wheel in (torch_npu(), mindspore()) if wheel is not None]
    if not found:
        raise ModuleNotFoundError(
            "neither torch_npu nor mindspore is installed for this Python; install torch and torch_npu of the same "
            "version, or mindspore"
        )
    return found


def cann_headers() -> Path:
    """The folder of CANN's headers, which torch_npu's wheel brings along and MindSpore's does not.

    Raises:
        ModuleNotFoundError: torch_npu is not installed.
    """
    folder = _folder("torch_npu")
    if folder is None:
        raise ModuleNotFoundError(
            "the emulated device is compiled against the headers of CANN in torch_npu's wheel, which is not installed "
            "for this Python; beside MindSpore: pip install --no-deps torch_npu"
        )
    return folder / "include"


def symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """The names in the dynamic symbol tables of shared libraries, without their versions."""
    table = subprocess.run(
        ["nm", "-D", which, *map(str, libraries)], capture_output=True, text=True, timeout=120
    ).stdout
    lines = (line.split() for line in table.splitlines())
    # Weak symbols may be missing, and are no use to look for; "nm" prints the name last, after one letter.
    return {words[-1].partition("@")[0] for words in lines if len(words) >= 2 and words[-2] != "w"}


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
