# SPDX-License-Identifier: Apache-2.0
"""Starting ranks: what fails is named and nothing survives; joining a launch."""

import os
import platform as machine
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from hyperep_mindspore.launcher import MindSporeLauncher, launcher
from hyperep_mindspore.world import is_launched, join_world

from hyperep.launch import run_on_ranks
from hyperep.launch.pool import RankPool
from hyperep.launch.world import World
from hyperep.platform.errors import RankFailure

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import listening


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_names_every_rank_and_the_scheduler():
    plan = MindSporeLauncher().plan(3)
    assert [process.ranks for process in plan.processes] == [(0,), (1,), (2,)]
    environments = [process.environment for process in plan.processes]
    assert [e["MS_NODE_ID"] for e in environments] == ["0", "1", "2"]
    assert {e["MS_ROLE"] for e in environments} == {"MS_WORKER"}
    (scheduler,) = plan.auxiliaries
    assert scheduler.environment["MS_ROLE"] == "MS_SCHED"
    assert {e["MS_SCHED_PORT"] for e in environments} == {scheduler.environment["MS_SCHED_PORT"]}
    assert MindSporeLauncher().plan(1).auxiliaries == ()


def test_half_a_launch_is_named():
    assert not is_launched({})
    assert not is_launched({"MS_WORKER_NUM": "2"})
    with pytest.raises(ValueError, match="not MS_SCHED_HOST, MS_SCHED_PORT; launch with msrun"):
        is_launched({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2"})
    assert is_launched(launcher.plan(2).processes[0].environment)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MS_WORKER_NUM": "two"}, "MS_WORKER_NUM='two', which is not a whole number"),
        ({"MS_SCHED_PORT": "99999"}, "MS_SCHED_PORT=99999"),
        ({"RANK_ID": "2"}, "RANK_ID=2 and MS_WORKER_NUM=2, but ranks go from 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_are_named(changed, message):
    with pytest.raises(ValueError, match="the environment has") as caught:
        is_launched({**launcher.plan(2).processes[0].environment, **changed})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "told", [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}]
)
def test_a_task_of_a_scheduler_is_not_silently_alone(told, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MindSpore does not join that launch: launch with msrun"):
        join_world()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nobody_else_can_reach_a_run():
    with World(launcher, "mindspore", 2, deadline=240.0) as world:
        world.run("rank_cases:world", {}, deadline=120.0)
        found = listening.of_this_process_and_its_children()
        assert len(found) >= 3, "the scheduler and both ranks listen"
        assert listening.beyond_loopback(found) == []


def test_a_port_of_the_scheduler_that_somebody_else_took_is_no_verdict(monkeypatch):
    from hyperep_mindspore import launcher as module

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], module.free_port()])
        monkeypatch.setattr(module, "free_port", lambda: next(ports))
        assert run_on_ranks(launcher, "mindspore", "rank_cases:process_id", {}, 2, deadline=240.0)
    assert next(ports, None) is None


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="the system does not tell whether a process is stopped")
def test_a_rank_that_is_stopped_is_named_and_ends_all():
    with RankPool(launcher, "mindspore", 2) as pool:
        pids = pool.run("rank_cases:process_id", {}, deadline=120.0)
        threading.Timer(1.0, os.kill, (pids[1], signal.SIGSTOP)).start()
        with pytest.raises(RankFailure, match="rank 1 of 2 was stopped: by SIGSTOP"):
            pool.run("rank_cases:sleep", {"seconds": 300}, deadline=200.0)
        assert not any(_alive(pid) for pid in pids)


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match=r"device='tpu': choose one of \['ascend', 'cpu', 'gpu'\]"):
        join_world("tpu")


@pytest.mark.parametrize(
    ("program", "message"),
    [("fail", "rank 1 of 2 raised: ZeroDivisionError: division of an expert by zero"), ("die", "rank 1 of 2 died")],
)
def test_a_rank_that_fails_ends_all_within_seconds(program, message):
    with RankPool(launcher, "mindspore", 2) as pool:
        pids = pool.run("rank_cases:process_id", {}, deadline=120.0)
        began = time.monotonic()
        with pytest.raises(RankFailure, match=re.escape(message)):
            pool.run(f"rank_cases:{program}", {"rank": 1}, deadline=120.0)
        assert time.monotonic() - began < 20
        assert not any(_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_scheduler_ends_with_the_ranks():
    others = _own_schedulers()  # those of warm worlds that other tests left up
    with RankPool(launcher, "mindspore", 2) as pool:
        pool.run("rank_cases:world", {}, deadline=120.0)
        assert _own_schedulers() - others
    end = time.monotonic() + 10
    while _own_schedulers() - others:
        assert time.monotonic() < end, "the scheduler outlives its launch"
        time.sleep(0.1)


def _own_schedulers():
    """Process ids of the schedulers that this process has started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if b"MS_ROLE=MS_SCHED" in environment and stat[0] != "Z" and int(stat[1]) == os.getpid():
            found.add(int(entry.name))
    return found


@pytest.mark.skipif(machine.libc_ver()[0] != "glibc", reason="allocation is tuned on glibc")
def test_a_rank_keeps_the_memory_that_it_has(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    # 400 MB are 200 huge pages, or 100,000 small ones.
    assert run_on_ranks(launcher, "mindspore", "rank_cases:faults_of_the_next_array", {}, 1, deadline=240.0) < 20
