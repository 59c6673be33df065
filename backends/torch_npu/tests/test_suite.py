# SPDX-License-Identifier: Apache-2.0
"""The conformance suite and the training program, on the device: what a user runs, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = ["--dim", "32", "--heads", "2", "--seq-len", "32", "--batch-tokens", "256", "--steps", "6"]
EXCHANGE = ["--only", "A2A-uneven-splits", "--only", "A2A-integers"]
CHUNKS = ["--only", "EP-chunks", "--only", "EP-chunks-cost"]


def hyperep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hyperep", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280, check=False
    )


def losses(platform: str, folder: Path, *arguments: str) -> list[float]:
    out = str(folder / platform)
    done = hyperep("train", "--platform", platform, "--ranks", "2", "--out", out, *MODEL, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", ["1", "2", "4"])
def test_the_platform_conforms(tmp_path, ranks):
    report = tmp_path / "report.json"
    done = hyperep("conformance", "run", "--platform", "torch_npu", "--world-size", ranks, "--report", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["conforms"]
    assert ("emulated" in found["device"]) == ("EMULATED_NPUS" in os.environ)


@pytest.mark.emulator
def test_the_suite_finds_a_platform_that_does_not_wait(tmp_path):
    """The mutant conforms while the device is fast; late streams expose it."""
    described = tmp_path / "without_wait-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: without-wait\nVersion: 0.1\n")
    (described / "entry_points.txt").write_text("[hyperep.platforms]\ntorch_npu_without_wait = without_wait\n")
    search = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    run = ["conformance", "run", "--platform", "torch_npu_without_wait", "--world-size", "2", *EXCHANGE]
    done = hyperep(*run, PYTHONPATH=search, EMULATED_NPU_DELAY_MS="100")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "asked for: not passed" in done.stdout
    right = hyperep(
        "conformance", "run", "--platform", "torch_npu", "--world-size", "2", *EXCHANGE, EMULATED_NPU_DELAY_MS="100"
    )
    assert right.returncode == 0, right.stdout + right.stderr


@pytest.mark.emulator
def test_layers_in_chunks_conform_in_late_streams():
    """And all that they rest on. That a wait which is left out is noticed is shown in ``test_visibility.py``."""
    run = ["conformance", "run", "--platform", "torch_npu", "--world-size", "2", *CHUNKS]
    done = hyperep(*run, EMULATED_NPU_DELAY_MS="20")
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_agrees_with_the_unsharded_model_and_with_the_reference_platform(tmp_path):
    found = losses("torch_npu", tmp_path, "--verify")
    assert found[-1] < found[0]
    assert found == pytest.approx(losses("loopback", tmp_path), rel=1e-4)
