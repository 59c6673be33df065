# SPDX-License-Identifier: Apache-2.0
"""The launcher: results, and every way in which ranks can fail to give one. Ranks are processes of torchrun's agent."""

import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from hyperep_torch.launcher import launcher

from hyperep.platform.errors import RankFailure


def test_a_program_runs_on_every_rank_and_rank_0_answers():
    before = signal.getsignal(signal.SIGINT)
    assert launcher.run("torch", "programs:total", {"number": 3}, 2, deadline=60) == [3, 5, 7]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_that_raises_is_reported_first_with_its_own_traceback():
    with pytest.raises(RankFailure) as caught:
        launcher.run("torch", "programs:raise_on", {"bad_rank": 1}, 2, deadline=60)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["rank 1 of 2 failed", "--- rank 1 raised"]
    assert "ZeroDivisionError: division of an expert by zero" in lines[: lines.index("--- rank 0 raised")]


def test_a_rank_that_dies_is_named_before_those_that_lost_it():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed\n--- rank 1 died without a trace"):
        launcher.run("torch", "programs:die_on", {"bad_rank": 1}, 2, deadline=60)


def test_ranks_that_hang_end_at_the_deadline_and_say_where_they_stood():
    began = time.monotonic()
    with pytest.raises(RankFailure, match="2 ranks were not done after 10 s") as caught:
        launcher.run("torch", "programs:sleep_on", {"bad_rank": 1}, 2, deadline=10)
    assert time.monotonic() - began < 30
    stood = str(caught.value).split("--- rank 1 stood at")
    assert "in barrier" in stood[0]
    assert "in sleep_on" in stood[1]
    assert "in barrier" not in stood[1]


def test_a_program_that_does_not_exist_is_an_error_of_the_ranks():
    with pytest.raises(RankFailure, match="no_such_program"):
        launcher.run("torch", "programs:no_such_program", {}, 1, deadline=60)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="allocation is tuned on glibc")
@pytest.mark.parametrize(("chosen", "kept"), [({}, True), ({"MALLOC_MMAP_MAX_": "65536"}, False)])
def test_a_rank_keeps_the_memory_that_it_has_unless_its_user_says_otherwise(chosen, kept, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    faults = launcher.run("torch", "programs:faults_of_the_next_tensor", {}, 1, deadline=60)
    # 400 MB are 200 huge pages, or 100,000 small ones.
    assert faults < 20 if kept else faults > 100


@pytest.mark.skipif(sys.platform != "linux", reason="parents take their ranks along by a feature of Linux")
def test_ranks_end_with_the_process_that_launched_them(tmp_path):
    code = (
        "from hyperep_torch.launcher import launcher\n"
        f"launcher.run('torch', 'programs:write_pid_and_sleep', {{'folder': {str(tmp_path)!r}}}, 2, deadline=100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        _until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(f.name) for f in tmp_path.iterdir()]
    _until(lambda: not any(_lives(pid) for pid in pids), 10)


def test_a_plan_describes_a_world_that_torch_can_join():
    plan = launcher.plan(3)
    environments = [process.environment for process in plan.processes]
    assert [e["RANK"] for e in environments] == [e["LOCAL_RANK"] for e in environments] == ["0", "1", "2"]
    assert {e["WORLD_SIZE"] for e in environments} == {"3"}
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environments}) == 1
    assert plan.auxiliaries == ()


def test_joined_inside_a_launch_only(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not launcher.joined()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher.joined()


def _until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
