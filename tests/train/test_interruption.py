# SPDX-License-Identifier: Apache-2.0
"""Asking a run to end: one line, the status that shells know, and nothing left; and launches that are not joined."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hyperep.cli import main as hyperep

SMALL = ["--dim", "16", "--heads", "2", "--experts", "4", "--seq-len", "16", "--batch-tokens", "128", "--layers", "1"]


@pytest.fixture
def running(text, tmp_path):
    """A command that trains, and has done some steps."""
    # A process in the background inherits that some signals are ignored, and leaves it so, as does what it starts.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hyperep", "train", *SMALL, "--platform", "loopback", "--ranks", "2"]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--text", text, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    end = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no step was done"
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "hyperep: interrupted"),
        (signal.SIGTERM, 143, "hyperep: ended by SIGTERM"),
        (signal.SIGHUP, 129, "hyperep: ended by SIGHUP"),
    ],
)
def test_a_run_that_is_asked_to_end_says_so_in_a_line(running, number, status, line):
    running.send_signal(number)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == status, errors
    assert errors.splitlines()[-1] == line
    assert "Traceback" not in errors
    assert not output


@pytest.mark.parametrize("command", ["train", "bench"])
@pytest.mark.parametrize(
    "told", [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}]
)
def test_tasks_of_a_scheduler_do_not_all_run_the_same_thing(command, told, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        hyperep([command, "--platform", "loopback"])
    assert end.value.code == 2
    errors = capfd.readouterr().err
    assert "platform 'loopback' does not join that launch" in errors
    assert "--ranks" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "bench"])
def test_a_timeout_that_cannot_be_is_one_line(command, capfd):
    with pytest.raises(SystemExit) as end:
        hyperep([command, "--platform", "loopback", "--timeout", "0"])
    assert end.value.code == 2
    assert "timeout=0 must be a positive number of seconds" in capfd.readouterr().err
    assert "HYPEREP_TIMEOUT" not in os.environ
