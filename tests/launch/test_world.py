# SPDX-License-Identifier: Apache-2.0
"""Worlds of real processes: results, failures, deadlines, and that nothing is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperep.launch.pool import RankPool
from hyperep.launch.processes import run_processes
from hyperep.launch.world import World
from hyperep.platform.errors import RankFailure

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _programs_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def plain(*auxiliaries):
    from programs import Plain

    return Plain(auxiliaries)


def gone(pid, within=5.0):
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended; whoever inherited it has not collected it yet
            return True
        time.sleep(0.05)
    return False


def test_a_run_returns_what_rank_0_returned():
    assert run_processes(plain(), "plain", "programs:describe", {"greeting": "hello"}, 2, deadline=30) == (
        "hello from plain rank 0"
    )


def test_the_first_failing_rank_comes_first_with_its_own_traceback_and_exception():
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 raised: LookupError: no such expert on rank 1") as caught:
        run_processes(plain(), "plain", "programs:fail_on", {"rank": 1, "wait": 0.1}, 2, deadline=60)
    assert time.monotonic() - began < 20
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, LookupError)
    text = str(caught.value)
    assert "in fail_on" in text.split("--- rank 0")[0], "the traceback of the rank itself"
    assert "programs.py" in text.split("--- rank 0: still running")[1], "where the other one stood"


def test_a_rank_that_dies_ends_the_run_and_comes_before_the_peers_that_noticed():
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 of 3 died: killed by SIGKILL") as caught:
        run_processes(plain(), "plain", "programs:die_on", {"rank": 0}, 3)
    assert time.monotonic() - began < 20
    assert [(e.ranks, e.end.value) for e in caught.value.ends] == [
        ((0,), "died"),
        ((1,), "raised"),
        ((2,), "still running"),
    ]


def test_a_rank_that_hangs_is_stopped_at_the_deadline_and_shows_where_it_stood():
    with World(plain(), "plain", 2, deadline=30, quiet=True) as world:
        ids = world.run("programs:process_id", {}, deadline=10)
        with pytest.raises(RankFailure, match="not done within the deadline of 1 s") as caught:
            world.run("programs:stand_still_here", {"rank": 1}, deadline=1)
    assert "in stand_still_here" in str(caught.value).split("--- rank 1: still running")[1]
    assert "--- rank 0: finished" in str(caught.value)
    assert all(gone(pid) for pid in ids)


def test_a_rank_that_cannot_start_is_named():
    from programs import Unstartable

    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised: ImportError: libframework\.so: not found"):
        World(Unstartable(), "plain", 2, deadline=30, quiet=True)


def test_an_auxiliary_that_ends_with_an_error_ends_the_run_and_shows_what_it_printed():
    from programs import scheduler

    launcher = plain(scheduler("import sys, time; time.sleep(1); print('port is taken'); sys.exit(3)"))
    with pytest.raises(
        RankFailure, match="'scheduler', which the ranks need beside them, ended with status 3"
    ) as caught:
        run_processes(launcher, "plain", "programs:stand_still_here", {"rank": 0}, 1, deadline=30)
    assert "port is taken" in str(caught.value)


def test_a_pool_keeps_its_ranks_and_replaces_them_after_a_failure():
    with RankPool(plain(), "plain", 2) as pool:
        first = pool.run("programs:process_id", {}, deadline=30)
        assert pool.run("programs:process_id", {}, deadline=30) == first
        with pytest.raises(RankFailure):
            pool.run("programs:fail_on", {"rank": 0}, deadline=30)
        assert set(pool.run("programs:process_id", {}, deadline=30)).isdisjoint(first)
        assert pool.worlds_made == 2


def test_what_a_rank_started_ends_with_the_world():
    with World(plain(), "plain", 1, deadline=30) as world:
        rank, child = world.run("programs:process_ids_of_children", {}, deadline=10)[0]
    assert gone(rank)
    assert gone(child)


def test_nothing_survives_a_parent_that_is_killed():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    parent = subprocess.Popen(
        [sys.executable, str(HERE / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    ids = [int(word) for word in parent.stdout.readline().split()]
    assert len(ids) == 3
    parent.kill()
    parent.wait()
    assert all(gone(pid) for pid in ids)


def test_ranks_that_are_threads_of_one_process_are_served_alike():
    from hyperep.loopback.launch import launcher

    with World(launcher, "loopback", 3, deadline=30, quiet=True) as world:
        assert world.run("programs:describe", {"greeting": "hi"}, deadline=10) == [
            f"hi from loopback rank {rank}" for rank in range(3)
        ]
