# SPDX-License-Identifier: Apache-2.0
"""The conformance suite and the training program on MindSpore's device: what a user runs, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = ["--layers", "1", "--dim", "16", "--heads", "2", "--seq-len", "16", "--batch-tokens", "64", "--experts", "4"]
EXCHANGE = ["--only", "A2A-uneven-splits", "--only", "A2A-integers"]


def hyperep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hyperep", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900, check=False
    )


def losses(platform: str, folder: Path, *arguments: str) -> list[float]:
    out = str(folder / platform)
    done = hyperep("train", "--platform", platform, "--ranks", "2", "--steps", "4", "--out", out, *MODEL, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_an_emulated_device_is_said_to_be_one(platform) -> None:
    assert platform.device == "emulated device ascend"
    listed = json.loads(hyperep("platforms", "--json").stdout)
    (reason,) = (record["reason"] for record in listed if record["name"] == "mindspore")
    assert reason.endswith("the default device is emulated Ascend"), reason


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_platform_conforms(tmp_path, ranks) -> None:
    report = tmp_path / "report.json"
    run = ["conformance", "run", "--platform", "mindspore", "--world-size", ranks, "--report", str(report)]
    done = hyperep(*run, "--deadline", "180")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["conforms"]
    assert found["device"] == "emulated device ascend"


@pytest.mark.timeout(900)
def test_the_suite_finds_a_platform_that_does_not_wait(tmp_path) -> None:
    """The mutant conforms while the device is fast; late streams expose it."""
    described = tmp_path / "without_wait-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: without-wait\nVersion: 0.1\n")
    (described / "entry_points.txt").write_text("[hyperep.platforms]\nmindspore_without_wait = without_wait\n")
    search = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    run = ["conformance", "run", "--world-size", "2", "--deadline", "180", *EXCHANGE]
    late = {"EMULATED_NPU_DELAY_MS": "100"}
    mutant = hyperep(*run, "--platform", "mindspore_without_wait", PYTHONPATH=search, **late)
    assert mutant.returncode == 1, mutant.stdout + mutant.stderr
    assert "asked for: not passed" in mutant.stdout
    right = hyperep(*run, "--platform", "mindspore", **late)
    assert right.returncode == 0, right.stdout + right.stderr


@pytest.mark.timeout(900)
def test_training_agrees_with_the_unsharded_model_and_with_the_reference_platform(tmp_path) -> None:
    found = losses("mindspore", tmp_path, "--verify")
    assert found[-1] < found[0]
    assert found == pytest.approx(losses("loopback", tmp_path), rel=1e-4)


def test_a_layer_calls_nothing_that_hardware_is_slow_at() -> None:
    """An operator that is compiled at each new number of rows, which is another one at each step."""
    program = str(Path(__file__).with_name("of_today.py"))
    environment = {**os.environ, "EMULATED_NPU_TELL_SLOW": "1"}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) > 0
    assert "emulated NPU: slow" not in done.stderr, done.stderr
