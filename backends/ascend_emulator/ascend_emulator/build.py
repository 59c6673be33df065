# SPDX-License-Identifier: Apache-2.0
"""Build the libraries that stand in for CANN, with the system compiler, against the headers in the torch_npu wheel."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from ascend_emulator.wheel import linked_libraries, undefined_cann_symbols, wheel_folder

SOURCES = Path(__file__).parent / "csrc"
RUNTIME = (
    *(f"runtime/{name}.c" for name in ("options", "stream", "event", "device", "memory")),
    "operators/operator.c",
)
HCCL = ("hccl/communicator.c", "hccl/reduce.c", "hccl/hccl.cc")

# Other libraries that the wheel is linked against, or opens by name. They hold nothing themselves: each is linked
# against libascendcl, where a search in them goes on.
EMPTY = (
    *("libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel"),
    *("libatb", "libopapi", "libcust_opapi"),
)

# Folders that torch_npu looks for in an installation of CANN, and reads nothing from.
FOLDERS = ("runtime", "compiler", "opp")

# Functions that an ordinary program calls without any effect that matters here: they succeed and do nothing. Some are
# not linked against but looked up by name. Whatever else the wheel is linked against fails, and says its name.
HARMLESS = frozenset(
    (
        *("MsprofRegisterCallback", "MsprofReportAdditionalInfo", "MsprofReportApi", "MsprofReportCompactInfo"),
        *("MsprofSysCycleTime", "MsprofGetHashId", "aclAppLog"),
        *("aclmdlInitDump", "aclmdlFinalizeDump", "aclmdlSetDump"),
        *("aclSetCompileopt", "aclopSetCompileFlag", "aclrtCtxSetSysParamOpt", "aclrtSetSysParamOpt"),
        *("aclrtSetDeviceSatMode", "aclrtSetOpExecuteTimeOut", "aclrtSetOpWaitTimeout", "aclrtSetStreamFailureMode"),
        "aclrtDeviceEnablePeerAccess",
    )
)


def cache_folder() -> Path:
    """Where builds are kept unless the caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperep-ascend-emulator"


def build(folder: Path | None = None) -> Path:
    """The folder of the built libraries, which are built only if no build of the same content is in `folder`.

    Raises:
        ModuleNotFoundError: torch_npu is not installed.
        RuntimeError: the compiler failed; the message holds its output.
    """
    wheel = wheel_folder()
    done = (folder or cache_folder()) / _fingerprint(wheel)
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent, prefix="building-") as made:
        fresh = Path(made) / "lib"
        fresh.mkdir()
        _build_into(fresh, wheel)
        try:
            fresh.rename(done)
        except OSError:
            if not done.is_dir():  # another process that built the same may have been faster
                raise
    return done


def _fingerprint(wheel: Path) -> str:
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.rglob("*.[ch]*")), Path(__file__), Path(__file__).with_name("wheel.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in linked_libraries(wheel):
        digest.update(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _build_into(out: Path, wheel: Path) -> None:
    include = wheel / "include"
    flags = [
        *("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{include}"),
        *(f"-I{SOURCES / folder}" for folder in ("runtime", "hccl", "operators")),
        *(f"-I{include / 'third_party' / name / 'inc'}" for name in ("acl", "hccl")),
    ]
    objects = {name: out / f"{Path(name).name}.o" for name in RUNTIME + HCCL}
    for name, made in objects.items():
        compiler = ["g++", "-std=c++17"] if name.endswith(".cc") else ["gcc", "-std=gnu11"]
        _run([*compiler, *flags[1:], "-c", str(SOURCES / name), "-o", str(made)])
    stubs = out / "stubs.c"
    stubs.write_text(stub_source(undefined_cann_symbols(wheel) | HARMLESS, defined_symbols(list(objects.values()))))
    runtime = [str(objects[name]) for name in RUNTIME]
    # The sonames are those of CANN, and libhccl.so finds its neighbour libascendcl.so by $ORIGIN.
    _run(["gcc", *flags, "-Wl,-soname,libascendcl.so", "-o", str(out / "libascendcl.so"), *runtime, str(stubs)])
    hccl = [str(objects[name]) for name in HCCL]
    runtime_too = ["-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", f"-L{out}", "-lascendcl"]
    _run(["g++", *flags, "-Wl,-soname,libhccl.so", "-o", str(out / "libhccl.so"), *hccl, *runtime_too])
    for name in EMPTY:
        _run(["gcc", *flags, f"-Wl,-soname,{name}.so", "-o", str(out / f"{name}.so"), *runtime_too])
    for name in FOLDERS:
        (out / name).mkdir()
    for left in (*objects.values(), stubs):
        left.unlink()


def defined_symbols(objects: list[Path]) -> set[str]:
    """The names of the functions that object files define."""
    table = subprocess.run(
        ["nm", "--defined-only", "--extern-only", *map(str, objects)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return {line.split()[-1] for line in table.splitlines() if " T " in line}


def stub_source(wanted: set[str], defined: set[str]) -> str:
    """C source of the functions that are wanted and not defined: harmless ones succeed, the others say so and fail."""
    lines = ["#include <stdio.h>"]
    for name in sorted(wanted - defined):
        if name in HARMLESS:
            lines.append(f"int {name}(void) {{ return 0; }}")
        else:
            lines.append(
                f'int {name}(void) {{ fputs("emulated NPU: {name} is not emulated\\n", stderr); return 207000; }}'
            )
    return "\n".join(lines) + "\n"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        raise RuntimeError(f"the emulated NPU needs gcc, g++ and nm; {error.filename} was not found") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
