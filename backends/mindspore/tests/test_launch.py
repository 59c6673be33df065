# SPDX-License-Identifier: Apache-2.0
"""Starting ranks: what fails is named and nothing survives; joining msrun; the native example under it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hyperep_mindspore.launcher import MindSporeLauncher, launcher
from hyperep_mindspore.world import is_launched, join_world

from hyperep.launch.pool import RankPool
from hyperep.platform.errors import RankFailure

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_moe.py"


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


def test_the_native_example_trains_under_msrun(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mindspore.parallel.cluster.run"),
        *("--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--join=True"),
        *(f"--log_dir={tmp_path / 'logs'}", str(EXAMPLE)),
    ]
    # msrun starts its workers with the python that is first in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    msrun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    try:
        printed, _ = msrun.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        msrun.send_signal(signal.SIGINT)  # ends its workers, which have process groups of their own
        msrun.wait(20)
        raise
    logs = "\n".join(log.read_text(errors="replace") for log in sorted((tmp_path / "logs").glob("worker_*.log")))
    assert msrun.returncode == 0, printed[-2000:] + logs[-4000:]
    losses = [float(value) for value in re.findall(r"^\d+ \(4, 128, 64\) (\S+)$", logs, flags=re.M)]
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]
