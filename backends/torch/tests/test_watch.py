# SPDX-License-Identifier: Apache-2.0
"""Ranks that torchrun started see what becomes of each other."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from hyperep_torch import watch
from hyperep_torch.watch import Peer, Watch, next_machine, stopped, this_peer

PROGRAM = """
import os, sys, time, torch
from hyperep_torch.platform import join
platform = join(device="cpu")
open(os.path.join(sys.argv[1], f"{platform.rank}.{os.getpid()}"), "w").close()
while True:
    platform.all_reduce(torch.ones(4))
    time.sleep(0.05)
"""


@pytest.fixture
def ranks(tmp_path):
    """Two ranks of torchrun in a loop of collectives: the agent, and the process id of each rank."""
    folder, program = tmp_path / "pids", tmp_path / "program.py"
    folder.mkdir()
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    with open(tmp_path / "output", "w+") as output:
        agent = subprocess.Popen(
            [*torchrun, "--local-addr=127.0.0.1", "--nproc-per-node=2", str(program), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _until(lambda: len(list(folder.iterdir())) == 2 or agent.poll() is not None, 250)
            pids = dict(map(int, f.name.split(".")) for f in folder.iterdir())
            assert sorted(pids) == [0, 1], (tmp_path / "output").read_text()
            yield agent, pids, tmp_path / "output"
        finally:
            agent.terminate()
            try:
                agent.wait(60)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_is_stopped_ends_the_launch_and_is_named(ranks):
    agent, pids, output = ranks
    time.sleep(3)  # the watch has begun
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    _until(lambda: not any(_lives(pid) for pid in pids.values()), 60)
    assert time.monotonic() - began < 40, "8 s, and what a busy machine makes of them"
    assert agent.wait(60) != 0
    assert "hyperep: error: rank 1 was stopped" in output.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="parents take their ranks along by a feature of Linux")
def test_an_agent_that_is_killed_leaves_no_rank(ranks):
    agent, pids, _ = ranks
    agent.kill()
    agent.wait()
    _until(lambda: not any(_lives(pid) for pid in pids.values()), 30)


@pytest.fixture
def quick(monkeypatch):
    """Watches that judge within seconds."""
    monkeypatch.setattr(watch, "_POLL", 0.2)
    monkeypatch.setattr(watch, "LOST_SECONDS", 3.0)


def _watches(*machines, store=None):
    """A watch for each rank, all in this process; what each of them ended with; and an event for each end."""
    store = store or dist.HashStore()
    found, ends, watches = {}, {}, {}

    def make(rank):
        ends[rank] = threading.Event()

        def end(lost):
            found[rank] = lost
            ends[rank].set()

        peer = Peer(rank, machines[rank], os.getpid(), "never")
        watches[rank] = Watch(store, peer, len(machines), "the store", end)

    makers = [threading.Thread(target=make, args=(rank,)) for rank in range(len(machines))]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    return watches, found, ends


def _silence(*watches):
    """What a cut link does to the ranks behind it, as the others see it."""
    for one in watches:
        one._over.set()
        for thread in one._threads:
            thread.join(60)


@pytest.mark.usefixtures("quick")
def test_a_machine_without_signs_of_life_is_lost_for_all_others():
    watches, found, ends = _watches("a", "a", "b", "b", "c")
    _silence(watches[2])
    assert not ends[0].wait(5), "rank 3 of that machine still gives signs"
    _silence(watches[3])
    assert all(ends[rank].wait(60) for rank in (0, 1, 4))
    # Rank 0 watches the next machine; the others read what it found.
    assert set(found.values()) == {"lost the machine b with ranks 2, 3 of 5: no sign of life for 3 s"}
    for one in watches.values():
        one.stop()


@pytest.mark.usefixtures("quick")
def test_ranks_that_left_as_they_should_are_not_lost():
    watches, found, ends = _watches("a", "b")
    watches[1].stop()
    assert not ends[0].wait(6)
    watches[0].stop()
    assert found == {}


class _Mute(dist.Store):
    """A store whose machine cannot be reached any more, once *cut* is set."""

    def __init__(self):
        super().__init__()
        self.real, self.cut, self.over = dist.HashStore(), threading.Event(), threading.Event()

    def set(self, key, value):
        self._wait()
        self.real.set(key, value)

    def multi_get(self, keys):
        self._wait()
        return self.real.multi_get(keys)

    def _wait(self):
        if self.cut.is_set():
            self.over.wait(120)


@pytest.mark.usefixtures("quick")
def test_a_store_that_does_not_answer_is_a_lost_machine(monkeypatch):
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    store = _Mute()
    watches, found, ends = _watches("a", "b", store=store)
    store.cut.set()
    try:
        assert ends[1].wait(60)
        assert found[1] == "lost the machine a with rank 0 of 2: the store does not answer any more"
    finally:
        store.over.set()
        for one in watches.values():
            one.stop()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("said", "lost"), [("Connection reset by peer", False), ("Connection timed out", True), ("No route to host", True)]
)
def test_a_store_that_is_closed_is_the_end_of_the_run_and_no_loss(said, lost, monkeypatch):
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    store = _Mute()
    watches, _found, ends = _watches("a", "b", store=store)

    def fail(*_):
        raise RuntimeError(said)

    store.multi_get = fail
    assert ends[1].wait(8) is lost
    for one in watches.values():
        one.stop()


def test_machines_are_watched_in_a_ring():
    peers = [Peer(rank, machine, 1, "") for rank, machine in enumerate("aabbc")]
    assert [p.rank for p in next_machine(peers, "a")] == [2, 3]
    assert [p.rank for p in next_machine(peers, "c")] == [0, 1]
    assert next_machine(peers[:2], "a") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_a_process_of_the_same_launcher_counts_as_stopped():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        began = watch._stat(child.pid)[watch._BEGAN]
        child.send_signal(signal.SIGSTOP)
        _until(lambda: watch._stat(child.pid)[watch._STATE] == "T", 10)
        # A child of this process, and not its sibling: whoever writes to the store cannot have it ended.
        assert not stopped(Peer(0, "here", child.pid, began))
    finally:
        child.kill()
        child.wait()
    assert not stopped(Peer(0, "here", child.pid, began))
    me = this_peer(0, "127.0.0.1", 29400)
    assert me.machine.endswith("(127.0.0.1)")
    assert not stopped(me)


def _until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
