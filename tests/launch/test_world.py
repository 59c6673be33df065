# SPDX-License-Identifier: Apache-2.0
"""Worlds of real processes: results, failures, deadlines, and that nothing is left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hyperep.launch import run_on_ranks
from hyperep.launch.failure import End, RankEnd, Shortfall
from hyperep.launch.pool import RankPool
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
    assert run_on_ranks(plain(), "plain", "programs:describe", {"greeting": "hello"}, 2, deadline=30) == (
        "hello from plain rank 0"
    )


def test_the_first_failing_rank_comes_first_with_its_own_traceback_and_exception():
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 raised: LookupError: no such expert on rank 1") as caught:
        run_on_ranks(plain(), "plain", "programs:fail_on", {"rank": 1, "wait": 0.1}, 2, deadline=60)
    assert time.monotonic() - began < 20
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, LookupError)
    text = str(caught.value)
    assert "in fail_on" in text.split("--- rank 0")[0], "the traceback of the rank itself"
    assert "fail_on (programs.py:" in text.split("--- rank 0: still running: in")[1], "where the other one stood"


def test_a_rank_that_dies_ends_the_run_and_comes_before_the_peers_that_noticed():
    began = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 of 3 died: killed by SIGKILL") as caught:
        run_on_ranks(plain(), "plain", "programs:die_on", {"rank": 0}, 3)
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


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="the system does not tell whether a process is stopped")
def test_a_rank_that_is_stopped_ends_the_run_with_its_name_and_the_signal():
    with World(plain(), "plain", 3, deadline=60, quiet=True) as world:
        ids = world.run("programs:process_id", {}, deadline=30)
        began = time.monotonic()
        with pytest.raises(RankFailure, match="rank 1 of 3 was stopped: by SIGSTOP, from outside") as caught:
            world.run("programs:stop_on", {"rank": 1})
        assert time.monotonic() - began < 30, "8 s, and what a busy machine makes of them"
    assert caught.value.rank == 1
    assert all(gone(pid) for pid in ids)


def test_a_rank_that_is_continued_in_time_goes_on():
    with World(plain(), "plain", 1, deadline=60) as world:
        (pid,) = world.run("programs:process_id", {}, deadline=30)

        def stop_for_a_while():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2)
            os.kill(pid, signal.SIGCONT)

        threading.Timer(0.5, stop_for_a_while).start()
        assert world.run("programs:steps", {"count": 5, "seconds": 0.3}, timeout=60) == [5]


def test_the_deadline_of_a_step_names_the_ranks_and_where_each_one_stands():
    with World(plain(), "plain", 3, deadline=60, quiet=True) as world, pytest.raises(RankFailure) as caught:
        world.run("programs:steps", {"count": 2, "seconds": 0.1, "stuck_on": 1}, timeout=4)
    lines = str(caught.value).splitlines()
    headline = "rank 1 of 3 did no step for 4 s; --timeout or HYPEREP_TIMEOUT sets how long one may take"
    assert lines[0] == headline
    assert lines[1].startswith("--- rank 1: still running: in stand_still_here (programs.py:")
    assert lines[2:] == ["--- rank 0: finished", "--- rank 2: finished", f"cause: {headline}"]
    assert "Thread 0x" in caught.value.details


def test_a_slow_program_may_take_longer_than_a_step():
    with World(plain(), "plain", 2, deadline=60) as world:
        assert world.run("programs:steps", {"count": 8, "seconds": 1.0}, timeout=6) == [8, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2])
def test_a_rank_that_somebody_ended_is_to_blame_and_not_those_that_lost_it(number):
    with pytest.raises(RankFailure, match=f"rank 2 of 4 died: killed by {number.name}, from outside") as caught:
        run_on_ranks(plain(), "plain", "programs:signal_myself_on", {"rank": 2, "number": number}, 4)
    assert caught.value.rank == 2
    lines = str(caught.value).splitlines()
    assert len(lines) <= 24, "a screen"
    # Innocents one line each; then, where people look, the cause.
    assert sorted(line.partition(":")[0] for line in lines[1:4]) == [f"--- rank {r}" for r in (0, 1, 3)]
    raised = ": raised: ConnectionError: a peer has gone: in signal_myself_on (programs.py:"
    assert any(raised in line for line in lines[1:4])
    assert lines[4] == f"cause: {lines[0]}"
    assert caught.value.details.count("in signal_myself_on") >= 3
    assert caught.value.details.splitlines()[-1] == lines[4]


@pytest.mark.parametrize("launcher", ["Plain", "HandlersOfItsOwn"])
def test_a_rank_that_crashes_leaves_its_stack_and_what_it_was_about_to_do(launcher):
    import programs

    with pytest.raises(RankFailure, match="rank 1 of 3 died: crashed with SIGSEGV; it stood in ") as caught:
        run_on_ranks(getattr(programs, launcher)(), "plain", "programs:crash_on", {"rank": 1}, 3, deadline=60)
    first, *others = caught.value.ends
    # ctypes is no code of the author's; the launcher's file is.
    assert re.match(r"string_at \(__init__\.py:\d+\) < crash_on \(programs\.py:\d+\)", first.place)
    assert first.doing == "all_gather(float32[3, 4])"
    assert "  its last call: all_gather(float32[3, 4])" in str(caught.value).splitlines()
    assert "Fatal Python error: Segmentation fault" in caught.value.details
    lines = [line for line in str(caught.value).splitlines() if line.startswith("--- rank")]
    assert len(lines) == len(others) == 2, "a line for each of them"
    assert all(" in " in line and "(programs.py:" in line for line in lines)


def test_a_place_holds_the_author_s_line_however_deep_it_waits():
    with World(plain(), "plain", 2, deadline=60, quiet=True) as world, pytest.raises(RankFailure) as caught:
        world.run("programs:wait_deep_inside", {}, deadline=1)
    assert len(caught.value.ends) == 2
    for end in caught.value.ends:
        assert re.fullmatch(
            r"(\w+ \(subprocess.py:\d+\) < ){4}\.\.\. < wait_deep_inside \(programs.py:\d+\)", end.place
        )
        assert end.place in end.line


def test_a_result_that_says_so_is_no_success_of_its_rank():
    def wrong(result):
        return Shortfall(summary=result, place="all_gather (mine.py:3)") if result else None

    with World(plain(), "plain", 3, deadline=60, quiet=True) as world, pytest.raises(RankFailure) as caught:
        world.run("programs:wrong_on", {"rank": 1}, deadline=60, shortfall=wrong)
    lines = str(caught.value).splitlines()
    assert lines[0] == "rank 1 of 3 failed: rows differ; in all_gather (mine.py:3)"
    places = {line.partition(":")[0]: line for line in lines}
    assert places["--- rank 0"].startswith("--- rank 0: still running: in wrong_on (programs.py:")
    assert places["--- rank 2"] == "--- rank 2: finished"
    assert caught.value.rank == 1


def test_a_long_traceback_is_cut_to_its_end():
    with pytest.raises(RankFailure) as caught:
        run_on_ranks(plain(), "plain", "json:loads", {"s": 3}, 4)
    assert len(str(caught.value).splitlines()) <= 24
    with pytest.raises(RankFailure) as caught:
        run_on_ranks(plain(), "plain", "programs:fail_deep", {"rank": 0, "depth": 60}, 4)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 24
    assert "LookupError: no such expert on rank 0" in lines
    assert "Traceback" in caught.value.details
    assert "Traceback" not in lines


def test_a_port_that_somebody_else_took_is_no_verdict():
    from programs import Meeting

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher = Meeting([port, port, 0])
        assert run_on_ranks(launcher, "plain", "programs:describe", {"greeting": "hi"}, 1, deadline=60)
        assert launcher.plans == 3
        hopeless = Meeting([port] * 4)
        with pytest.raises(RankFailure, match=r"OSError: .*Address already in use"):
            run_on_ranks(hopeless, "plain", "programs:describe", {"greeting": "hi"}, 1, deadline=60)
        assert hopeless.plans == 3


def test_ranks_meet_where_nobody_else_can_look_and_nothing_stays():
    with World(plain(), "plain", 2, deadline=60) as world:
        places = world.run("programs:meeting_place", {}, deadline=30)
        assert places[0] == places[1]
        assert places[0][1] == "drwx------"
        assert os.path.isdir(places[0][0])
    assert not os.path.exists(places[0][0])


def test_a_starter_that_is_asked_to_end_ends_its_ranks():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    starter = subprocess.Popen(
        [sys.executable, str(HERE / "starter.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(starter.stdout.readline())
    starter.send_signal(signal.SIGTERM)
    assert starter.stdout.read() == "ended by SIGTERM, 143\n"
    assert starter.wait(60) == 0
    assert gone(pid)


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
        run_on_ranks(launcher, "plain", "programs:stand_still_here", {"rank": 0}, 1, deadline=30)
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


def test_each_of_several_ranks_in_a_process_has_a_place_of_its_own():
    from hyperep.loopback.launch import launcher

    with World(launcher, "loopback", 3, deadline=60, quiet=True) as world, pytest.raises(RankFailure) as caught:
        world.run("programs:stand_apart", {}, timeout=3)
    places = {line.partition(":")[0]: line for line in str(caught.value).splitlines()}
    assert "in stand_still_here (" in places["--- rank 0"]
    assert "in stand_still_there (" in places["--- rank 1"]
    assert "in stand_still_there (" in places["--- rank 2"]


def test_a_line_that_is_too_long_loses_words_and_not_the_place():
    end = RankEnd(ranks=(3,), end=End.RAISED, summary="x" * 500 + "\nmore", place="all_gather (platform.py:88)")
    assert len(end.line) == 160
    assert end.line.startswith("rank 3: raised: xxx")
    assert end.line.endswith("x...: in all_gather (platform.py:88)")
