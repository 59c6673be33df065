# SPDX-License-Identifier: Apache-2.0
"""Whether the platform is found, and what it says where it cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hyperep_torch_npu.spec import CAPABILITIES

import hyperep
from hyperep.platform.validate import validate_platform

PROBE = "from hyperep_torch_npu.probe import probe; import json; v = probe(); print(json.dumps([v.viable, v.reason]))"


def ask(program: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run a program in this environment with some variables changed, or removed."""
    env = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)


def without_emulator() -> dict[str, str | None]:
    """Changes that take CANN away."""
    removed = ("LD_LIBRARY_PATH", "EMULATED_NPUS", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH")
    kept = [p for p in os.environ["PYTHONPATH"].split(os.pathsep) if Path(p).name != "autoload"]
    return {**dict.fromkeys(removed), "PYTHONPATH": os.pathsep.join(kept)}


def test_a_platform_object_has_every_member(platform):
    assert validate_platform(platform) == []
    assert platform.name == "torch_npu"
    assert platform.device == ("emulated device npu:0" if "EMULATED_NPUS" in os.environ else "npu:0")
    assert platform.capabilities == CAPABILITIES


def test_it_is_chosen_over_the_cpu_where_a_device_answers(monkeypatch):
    monkeypatch.delenv("HYPEREP_PLATFORM", raising=False)
    assert hyperep.get_platform().name == "torch_npu"


@pytest.mark.emulator
def test_an_emulated_device_is_said_to_be_one():
    viable, reason = json.loads(ask(PROBE).stdout)
    assert viable
    assert reason.endswith(f"{os.environ['EMULATED_NPUS']} emulated device(s)")


@pytest.mark.emulator
def test_without_cann_it_is_not_viable_and_says_what_is_missing():
    done = ask(PROBE, **without_emulator())
    viable, reason = json.loads(done.stdout)
    assert not viable
    assert reason.startswith("CANN libraries not found (libhccl.so, libascendcl.so)"), reason


@pytest.mark.emulator
def test_without_a_device_it_is_not_viable():
    viable, reason = json.loads(ask(PROBE, EMULATED_NPUS="0").stdout)
    assert not viable
    assert "no Ascend device answers" in reason


def test_describing_the_platform_imports_no_framework():
    program = (
        "import sys, hyperep_torch_npu.spec as s; s.hyperep_platform_spec();"
        "print([m for m in ('torch', 'torch_npu', 'hyperep_torch.platform') if m in sys.modules])"
    )
    assert ask(program).stdout.strip() == "[]"
