# SPDX-License-Identifier: Apache-2.0
"""Build the libraries that stand in for CANN, with the system compiler, against CANN's headers in torch_npu's wheel."""

import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ascend_emulator.wheels import Wheel, cann_headers, installed

SOURCES = Path(__file__).parent / "csrc"

# Which folders of csrc make up which library. The sonames are those of CANN.
PARTS = {
    "libascendcl": ("runtime", "operators", "older_operators", "graph_engine"),
    "libhccl": ("hccl",),
}

# Other libraries that the wheels are linked against, or open by name. They hold nothing themselves: each is linked
# against the two above, where a search in them goes on.
EMPTY = (
    *("libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libacl_tdt_queue"),
    *("libatb", "libopapi", "libcust_opapi", "libnnopbase", "libmsprofiler", "libprofapi"),
    *("libruntime", "libplatform", "libc_sec", "libascend_hal", "libgmem"),
)

# MindSpore finds an installation of CANN by the path of its libraries, in which it looks for these names.
HOME = Path("ascend-toolkit") / "latest"
LIBRARIES = HOME / "lib64"

# Folders that the wheels look for in an installation of CANN, and read nothing from.
FOLDERS = ("runtime", "compiler", "opp")

# What MindSpore asks the installation for, and compares with the version that its own operators were compiled with.
VERSION = "9.1.0"

# Functions that an ordinary program calls without any effect that matters here: they succeed and do nothing. Some are
# not linked against but looked up by name. Whatever else a wheel is linked against fails, and says its name.
HARMLESS = frozenset(
    (
        *("MsprofRegisterCallback", "MsprofReportAdditionalInfo", "MsprofReportApi", "MsprofReportCompactInfo"),
        *("MsprofSysCycleTime", "MsprofGetHashId", "aclAppLog"),
        *("aclmdlInitDump", "aclmdlFinalizeDump", "aclmdlSetDump"),
        *("aclSetCompileopt", "aclopSetCompileFlag", "aclrtCtxSetSysParamOpt", "aclrtSetSysParamOpt"),
        *("aclrtSetDeviceSatMode", "aclrtSetOpExecuteTimeOut", "aclrtSetOpWaitTimeout", "aclrtSetStreamFailureMode"),
        *("aclrtDeviceEnablePeerAccess", "aclrtSetExceptionInfoCallback"),
    )
)

# Functions of the graph engine that MindSpore calls whether there is a graph or not: constructors that register
# operators while its libraries are loaded, the engine's start and end, and questions to an operator for its attributes,
# whose defaults stay as the caller has set them. How their mangled names begin.
HARMLESS_IN_ENGINE = (
    *("_ZN2ge23OperatorCreatorRegisterC", "_ZN2ge10TensorTypeC", "_ZN2ge7PromoteC"),
    *("_ZN2ge12GEInitialize", "_ZN2ge10GEFinalize", "_ZNK2ge8Operator7GetAttr"),
)


def cache_folder() -> Path:
    """Where builds are kept unless the caller says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperep-ascend-emulator"


def build(folder: Path | None = None) -> Path:
    """The folder of the built installation, which is made only if none of the same content is in `folder`.

    Raises:
        ModuleNotFoundError: no framework is installed, or not the headers of CANN.
        RuntimeError: the compiler failed; the message holds its output.
    """
    wheels, include = installed(), cann_headers()
    done = (folder or cache_folder()) / _fingerprint(wheels)
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent, prefix="building-") as made:
        fresh = Path(made) / "cann"
        _build_into(fresh, wheels, include)
        try:
            fresh.rename(done)
        except OSError:
            if not done.is_dir():  # another process that built the same may have been faster
                raise
    return done


def _fingerprint(wheels: list[Wheel]) -> str:
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.rglob("*.*")), Path(__file__), Path(__file__).with_name("wheels.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in (library for wheel in wheels for library in wheel.libraries):
        digest.update(f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _build_into(root: Path, wheels: list[Wheel], include: Path) -> None:
    out = root / LIBRARIES
    out.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        compile_one = partial(_compile, out=out, include=include)
        objects = {name: list(compilers.map(compile_one, _sources(parts))) for name, parts in PARTS.items()}
    wanted = set().union(*(wheel.wanted() for wheel in wheels)) | HARMLESS
    stubs = out / "stubs.c"
    stubs.write_text(stub_source(wanted, defined_symbols([path for paths in objects.values() for path in paths])))
    objects["libascendcl"].append(_compile(stubs, out, include))
    # libhccl.so finds its neighbour libascendcl.so by $ORIGIN, and so do the empty ones both.
    neighbour = ["-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", f"-L{out}"]
    _link("libascendcl", out, objects["libascendcl"])
    _link("libhccl", out, [*objects["libhccl"], *neighbour, "-lascendcl"])
    for name in EMPTY:
        _link(name, out, [*neighbour, "-lascendcl", "-lhccl"])
    for folder in FOLDERS:
        (root / HOME / folder).mkdir()
    (root / HOME / "compiler" / "version.info").write_text(f"Version={VERSION}\n")
    for left in (stubs, *(path for paths in objects.values() for path in paths)):
        left.unlink()


def _sources(folders: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in (SOURCES / folder).iterdir() if path.suffix in (".c", ".cc"))


def _compile(source: Path, out: Path, include: Path) -> Path:
    made = out / f"{source.parent.name}-{source.name}.o"
    compiler = ["g++", "-std=c++17"] if source.suffix == ".cc" else ["gcc", "-std=gnu11"]
    if source.parent.name == "graph_engine":
        compiler.append("-D_GLIBCXX_USE_CXX11_ABI=0")  # CANN's own libraries are of the older ABI
    folders = [SOURCES / name for parts in PARTS.values() for name in parts]
    folders += [include, *(include / "third_party" / name / "inc" for name in ("acl", "hccl"))]
    flags = ["-fPIC", "-O2", "-Wall", "-Wextra", "-pthread", *(f"-I{folder}" for folder in folders)]
    _run([*compiler, *flags, "-c", str(source), "-o", str(made)])
    return made


def _link(name: str, out: Path, inputs: list[Path | str]) -> None:
    library = out / f"{name}.so"
    _run(["g++", "-shared", "-pthread", f"-Wl,-soname,{name}.so", "-o", str(library), *map(str, inputs)])


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
    """C source of the functions that are wanted and not defined: harmless ones succeed, the others say so and fail.

    A function of the graph engine is C++ and may have a result of any kind, so that it cannot fail but by aborting. Its
    mangled name is a name in C.
    """
    lines = ["#include <stdio.h>", '#include "emulator.h"']
    for name in sorted(wanted - defined):
        if name in HARMLESS or name.startswith(HARMLESS_IN_ENGINE):
            lines.append(f"int {name}(void) {{ return 0; }}")
        elif name.startswith("_Z"):
            lines.append(f'void {name}(void) {{ npu_die("the graph engine is not emulated: {name}"); }}')
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
