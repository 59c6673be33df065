# SPDX-License-Identifier: Apache-2.0
"""Two machines of two ranks, made of network namespaces: rows, tokens and two levels agree, and send what they must."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import nodes  # noqa: E402 (found by the path above)


def test_bytes_between_machines():
    reason = nodes.reason_against()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, str(BENCHMARKS / "slow_link.py"), "--tokens", "64", "--repetitions", "1"]
    command += ["--chunks", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    between = found["bytes_between_nodes"]
    assert between["levels"] == found["bytes_between_nodes_theory"]
    assert between["levels"] < between["tokens"] < between["rows"]
    # Two ranks of a machine tell two of the other the two counts of two chunks more; in levels one of the other.
    assert between["chunks"] == between["tokens"] + 2 * 2 * 2 * 2 * 2 * 8
    assert between["levels in chunks"] == between["levels"] + 2 * 2 * 2 * 2 * 8
