# SPDX-License-Identifier: Apache-2.0
"""The emulated device as a thing to start programs on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulator


def test_every_library_that_the_wheel_is_linked_against_is_found() -> None:
    """A missing library or symbol, which shows itself at some later version of the wheel."""
    import torch
    from ascend_emulator.wheels import torch_npu

    wheel = torch_npu()
    assert wheel is not None
    search = f"{os.environ['LD_LIBRARY_PATH']}:{Path(torch.__file__).parent / 'lib'}"
    done = subprocess.run(
        ["ldd", "-r", str(wheel.libraries[0])],
        env={**os.environ, "LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert any("libascendcl.so => " in line for line in lines)
    # CPython's own symbols are found in the process that loads the library, and CANN's in libtorch_npu's neighbours.
    elsewhere = (" Py", " _Py", "libnpu_profiler")
    problems = [
        line
        for line in lines
        if "not found" in line or ("undefined symbol" in line and not any(name in line for name in elsewhere))
    ]
    assert not problems


LOOK = "import importlib.util; importlib.util.find_spec('torch_npu'); import torch"


@pytest.mark.parametrize("program", ["import torch", "import torch_npu, torch", "import torch, torch_npu", LOOK])
def test_a_process_gets_the_kernels_whatever_it_imports_first(program: str) -> None:
    """Ranks of other launchers, which import what they like, without kernels."""
    check = "; print(float((torch.arange(3.).npu() * 2).sum()), torch.npu.device_count())"
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["6.0", os.environ["EMULATED_NPUS"]], done.stderr


def test_a_function_that_is_not_emulated_says_its_name() -> None:
    """A stub that answers 'success' for something that it did not do."""
    from ascend_emulator.build import stub_source

    source = stub_source({"aclDone", "aclInit", "aclAppLog", "_ZN2ge5GraphC1EPKc"}, {"aclInit"})
    assert "aclDone is not emulated" in source
    assert "the graph engine is not emulated: _ZN2ge5GraphC1EPKc" in source
    assert "int aclAppLog(void) { return 0; }" in source
    assert "aclInit" not in source


def test_a_build_is_used_again(tmp_path: Path) -> None:
    """Compiling at every start."""
    from ascend_emulator.build import LIBRARIES, build

    first = build(tmp_path)
    made = (first / LIBRARIES / "libhccl.so").stat().st_mtime_ns
    assert build(tmp_path) == first
    assert (first / LIBRARIES / "libhccl.so").stat().st_mtime_ns == made


def test_a_wheel_with_another_schema_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that go on standing in for an operator that has changed."""
    from ascend_emulator.torch_kernels import custom

    monkeypatch.setitem(custom.SCHEMAS, "npu_moe_token_permute", "npu::npu_moe_token_permute(Tensor tokens) -> Tensor")
    with pytest.raises(RuntimeError, match="another npu_moe_token_permute"):
        custom.check_schemas()
