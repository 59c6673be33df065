# SPDX-License-Identifier: Apache-2.0
"""Starting ranks: what fails is named and nothing survives; joining a launch."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from hyperep_mindspore.launcher import MindSporeLauncher, launcher
from hyperep_mindspore.world import is_launched, join_world

from hyperep.launch.pool import RankPool
from hyperep.platform.errors import RankFailure


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
