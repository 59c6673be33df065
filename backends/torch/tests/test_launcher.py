# SPDX-License-Identifier: Apache-2.0
"""The launcher: results, and every way in which ranks can fail to give one."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hyperep_torch.launcher import launcher

from hyperep.launch import run_on_ranks
from hyperep.launch.world import World
from hyperep.platform.errors import RankFailure

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import listening


def run(program, arguments, ranks, **options):
    return run_on_ranks(launcher, "torch", f"programs:{program}", arguments, ranks, **options)


def test_a_program_runs_on_every_rank_and_rank_0_answers():
    before = signal.getsignal(signal.SIGTERM)
    assert run("total", {"number": 3}, 2, deadline=120) == [3, 5, 7]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_raises_is_reported_first_with_its_own_traceback():
    with pytest.raises(RankFailure) as caught:
        run("raise_on", {"bad_rank": 1}, 2, deadline=120)
    first, rest = str(caught.value).split("--- rank 0")
    assert first.startswith("rank 1 of 2 raised: ZeroDivisionError: division of an expert by zero\n")
    assert "in raise_on" in first
    assert rest.count("\n") == 1, "a line, and the cause"


def test_a_rank_that_dies_is_named_before_those_that_lost_it():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 died: killed by SIGKILL, from outside") as caught:
        run("die_on", {"bad_rank": 1}, 2, deadline=120)
    assert str(caught.value).splitlines()[-1].startswith("cause: rank 1 of 2 died: killed by SIGKILL")


def test_ranks_that_hang_end_at_the_deadline_and_say_where_they_stood():
    with World(launcher, "torch", 2, deadline=120) as world:
        began = time.monotonic()
        with pytest.raises(RankFailure, match="not done within the deadline of 10 s") as caught:
            world.run("programs:sleep_on", {"bad_rank": 1}, deadline=10)
    assert time.monotonic() - began < 40
    lines = {line.partition(":")[0]: line for line in str(caught.value).splitlines()}
    assert " < wait (collectives.py:" in lines["--- rank 0"]
    assert "in sleep_on (programs.py:" in lines["--- rank 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_nobody_else_can_reach_a_run(ranks, monkeypatch):
    # What a user of several machines has set for launches over them.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with World(launcher, "torch", ranks, deadline=120) as world:
        world.run("programs:total", {"number": 3}, deadline=60)
        found = listening.of_this_process_and_its_children()
        assert len(found) >= ranks - 1, "gloo's ranks listen for each other"
        assert listening.beyond_loopback(found) == []


def test_a_program_that_does_not_exist_is_an_error_of_the_ranks():
    with pytest.raises(RankFailure, match="no_such_program"):
        run("no_such_program", {}, 1, deadline=120)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="allocation is tuned on glibc")
@pytest.mark.parametrize(("chosen", "kept"), [({}, True), ({"MALLOC_MMAP_MAX_": "65536"}, False)])
def test_a_rank_keeps_the_memory_that_it_has_unless_its_user_says_otherwise(chosen, kept, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    faults = run("faults_of_the_next_tensor", {}, 1, deadline=120)
    # 400 MB are 200 huge pages, or 100,000 small ones.
    assert faults < 20 if kept else faults > 100


@pytest.mark.skipif(sys.platform != "linux", reason="parents take their ranks along by a feature of Linux")
def test_ranks_end_with_the_process_that_launched_them(tmp_path):
    code = (
        "from hyperep.launch import run_on_ranks\n"
        "from hyperep_torch.launcher import launcher\n"
        f"arguments = {{'folder': {str(tmp_path)!r}}}\n"
        "run_on_ranks(launcher, 'torch', 'programs:write_pid_and_sleep', arguments, 2, deadline=250)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        _until(lambda: len(list(tmp_path.iterdir())) == 2, 200)
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
    assert not any("MASTER_ADDR" in e for e in environments), "they meet by a file"
    assert plan.auxiliaries == ()


@pytest.mark.parametrize(
    ("asked", "there", "message"),
    [
        ("cuda", 0, "device='cuda' was asked for, but PyTorch sees no such device"),
        ("cuda", 2, "local rank 2 has no cuda device of its own: this machine has 2; launch at most 2 ranks here"),
        ("tpu", 0, r"device='tpu' is unknown here; choose one of \['cuda', 'cpu'\]"),
    ],
)
def test_a_device_that_is_not_there_is_told_before_any_rank_starts(asked, there, message, monkeypatch):
    monkeypatch.setenv("HYPEREP_TORCH_DEVICE", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(ValueError, match=message):
        run("total", {"number": 3}, 3)


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
