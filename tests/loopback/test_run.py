# SPDX-License-Identifier: Apache-2.0
"""A world of threads: failures end all ranks with the first one's error, and nothing waits for ever."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import hyperep
from hyperep.launch import step_done
from hyperep.loopback import LoopbackPlatform, run
from hyperep.loopback.exchange import CollectiveTimeout, Exchange
from hyperep.platform.errors import RankFailure


def test_results_come_by_rank_and_each_rank_has_its_own_platform_in_scope():
    def on_rank(platform):
        assert hyperep.get_platform() is platform
        return platform.rank, platform.world_size

    assert run(on_rank, 3) == [(0, 3), (1, 3), (2, 3)]


def test_a_rank_that_raises_ends_the_others():
    def on_rank(platform):
        if platform.rank == 1:
            raise LookupError("no such expert")
        platform.all_reduce(np.ones(1))

    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 3 raised: LookupError: no such expert") as caught:
        run(on_rank, 3)
    assert isinstance(caught.value.__cause__, LookupError)
    assert "in on_rank" in str(caught.value), "the message has the rank's own traceback"
    assert time.monotonic() - start < 10


def test_a_rank_that_is_late_is_named_at_the_deadline():
    gathered = threading.Event()

    def on_rank(platform):
        if platform.rank == 2:
            gathered.wait(10)
            return
        try:
            platform.all_gather(np.ones(1))
        finally:
            gathered.set()

    with pytest.raises(
        RankFailure, match=r"in 'all_gather' of group \(0, 1, 2\): 0.2 s are over, and ranks \[2\] never issued it"
    ) as caught:
        run(on_rank, 3, deadline=0.2)
    assert isinstance(caught.value.__cause__, CollectiveTimeout)


def test_nobody_waits_for_a_rank_that_has_ended():
    def on_rank(platform):
        if platform.rank != 2:
            platform.all_gather(np.ones(1))

    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"ranks \[2\] have ended, and ranks \[2\] never issued it") as caught:
        run(on_rank, 3)
    assert isinstance(caught.value.__cause__, CollectiveTimeout)
    assert time.monotonic() - start < 10


def test_an_exchange_that_fails_keeps_nothing():
    exchange, payload = Exchange(2), np.ones(1)
    kept = weakref.ref(payload)
    collect = [exchange.post((0, 1), 1, rank, f"operation {rank}", payload) for rank in range(2)]
    for one in collect:
        with pytest.raises(RuntimeError, match="issued different collectives"):
            one()
    del payload
    assert kept() is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda p: p.all_reduce(np.ones(1)), lambda p: p.all_gather(np.ones(1))),
        (lambda p: p.all_reduce(np.ones(1), op="max"), lambda p: p.all_reduce(np.ones(1))),
        (lambda p: p.new_group([0, 1]), lambda p: p.new_group([0])),
        (lambda p: p.all_to_all_single(np.ones(2)), lambda p: p.all_to_all_single(np.ones(2, np.float32))),
    ],
    ids=["kind", "operation", "groups", "dtype"],
)
def test_ranks_out_of_step_are_told(first, second):
    with pytest.raises(RankFailure, match=r"issued different collectives: \{"):
        run(lambda platform: (first if platform.rank else second)(platform), 2)


def test_splits_that_do_not_mirror_are_told():
    def on_rank(platform):
        platform.all_to_all_single(np.ones(3), output_splits=[1, 1], input_splits=[1, 2])

    with pytest.raises(RankFailure, match=r"output_splits=\[1, 1\] but the others sent \[\d, \d\] rows"):
        run(on_rank, 2)


def test_splits_that_do_not_sum_to_the_rows():
    with pytest.raises(ValueError, match=r"input_splits=\[2\] must be 1 non-negative counts that sum to the 3 rows"):
        LoopbackPlatform().all_to_all_single(np.ones(3), [3], [2])


def test_a_group_is_for_its_members():
    def on_rank(platform):
        group = platform.new_group([0])
        if platform.rank == 1:
            with pytest.raises(ValueError, match=r"rank 1 is not in group \[0\] and must not use it"):
                platform.all_reduce(np.ones(1), group)

    run(on_rank, 2)


def test_what_is_sent_is_as_it_was_when_it_was_sent():
    """The sender may overwrite its tensor while a slower rank has not read it yet."""

    def on_rank(platform):
        x = np.full(1, float(platform.rank))
        sent = np.repeat(x, 2)
        work = platform.all_to_all_single(sent, async_op=True)
        sent[:] = -1.0
        gathered = platform.all_gather(x)
        x[:] = -1.0
        platform.barrier()
        assert gathered.tolist() == [0.0, 1.0]
        assert work.wait().tolist() == [0.0, 1.0]
        assert work.wait() is work.wait()

    run(on_rank, 2)


def test_an_empty_world_is_refused():
    with pytest.raises(ValueError, match="world_size=0: a world has at least one rank"):
        run(lambda platform: None, 0)


def test_a_rank_that_hangs_in_its_own_code_is_named_with_its_place():
    """Its peers give up waiting; it does not answer, and must not keep the run from ending."""
    let_go = threading.Event()

    def on_rank(platform):
        if platform.rank == 1:
            let_go.wait(120)
        platform.all_reduce(np.ones(1))

    start = time.monotonic()
    try:
        with pytest.raises(RankFailure, match=r"rank 1 of 3 hung: rank \d in 'all_reduce.* 0.5 s are over") as caught:
            run(on_rank, 3, deadline=0.5)
    finally:
        let_go.set()
    assert time.monotonic() - start < 60
    assert caught.value.rank == 1
    assert "on_rank (test_run.py:" in caught.value.ends[0].place


def test_the_deadline_of_a_step_names_the_rank_that_does_none():
    let_go = threading.Event()

    def on_rank(platform):
        for _ in range(3):
            platform.all_reduce(np.ones(1))
            step_done()
        if platform.rank == 1:
            let_go.wait(120)
        platform.all_reduce(np.ones(1))

    try:
        with pytest.raises(
            RankFailure, match="no rank has done a step for 2 s; --timeout or HYPEREP_TIMEOUT"
        ) as caught:
            run(on_rank, 4, timeout=2)
    finally:
        let_go.set()
    # Three wait for one another, one stands alone: it comes first.
    first, *others = caught.value.ends
    assert first.ranks == (1,)
    assert "on_rank (test_run.py:" in first.place
    assert all("_collect (exchange.py:" in end.place for end in others)


def test_a_rank_may_be_as_slow_as_the_environment_says(monkeypatch):
    monkeypatch.delenv("HYPEREP_TIMEOUT", raising=False)
    assert Exchange(2).deadline == 600  # and not 60: a checkpoint was seen to take 70
    monkeypatch.setenv("HYPEREP_TIMEOUT", "5")
    assert Exchange(2).deadline == 5


SUSPENDED = """
import time
import numpy as np
from hyperep.loopback import run

def on_rank(platform):
    if platform.rank == 1:
        print("waiting", flush=True)
        time.sleep(2.5)
    return platform.all_reduce(np.ones(1)).tolist()

print(run(on_rank, 2, deadline=6.0, timeout=8.0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_process_that_was_suspended_goes_on():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(9)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "[[2.0], [2.0]]\n"
    finally:
        process.kill()
        process.wait()
