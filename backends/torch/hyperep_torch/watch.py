# SPDX-License-Identifier: Apache-2.0
"""Ranks of somebody else's launch (torchrun, srun, ...) watch one another: what was lost is named, and all end.

Where hyperep starts the ranks, their starter sees all of them. Here nobody does: a launcher knows the processes of its
own machine, and no more of them than whether they live. So each rank, every two seconds,

1. leaves a sign of life in the store that the ranks have met by, and reads the verdict there, if any;
2. looks on its own machine for ranks that are stopped (SIGSTOP), and after a while ends them: their launcher then sees
   them die, and ends the rest;
3. if it is the first rank of its machine, looks for signs of life of the ranks of the next one. When all of them have
   been missing for long, that machine is lost, which is a verdict for all who can still read it.

A store that does not answer means that the machine of rank 0 is lost; a store that is closed, that the run has ended.
These threads wait for a busy interpreter, so late is not lost: that a rank is stopped is the kernel's word, and a
machine is lost only when none of its ranks has given a sign for half a minute.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from hyperep.launch.clock import RunningClock
from hyperep.launch.collect import STOPPED_SECONDS
from hyperep.launch.joined import end_process
from hyperep.launch.steps import LateRanks

__all__ = ["LOST_SECONDS", "Peer", "Watch", "next_machine", "stopped", "this_peer"]

LOST_SECONDS = 30.0
"""Seconds without a sign of life after which a machine is given up."""
_POLL = 2.0
_VERDICT = "verdict"
_LEFT = -1
"""The sign of a rank that has left as it should."""
_UNREACHABLE = ("timed out", "timeout", "unreachable", "no route")
"""What an error of the store says where it is the network's, and not that of a run that has ended."""


@dataclass(frozen=True)
class Peer:
    """A rank, and where it lives."""

    rank: int
    machine: str
    """Name, and the address that other machines see."""
    pid: int
    began: str
    """When the process began, as the kernel tells: with it a process id means one process only."""


def this_peer(rank: int, towards: str, port: int) -> Peer:
    """This process; its machine's address is the one from which it reaches the host *towards*."""
    family, kind, _, _, where = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing
        address = probe.getsockname()[0]
    return Peer(rank, f"{socket.gethostname()} ({address})", os.getpid(), _stat(os.getpid())[_BEGAN])


def next_machine(peers: Sequence[Peer], machine: str) -> list[Peer]:
    """The ranks of the machine after *machine*; the last one's next is the first. None where there is one only."""
    machines = list(dict.fromkeys(peer.machine for peer in peers))
    following = machines[(machines.index(machine) + 1) % len(machines)]
    return [peer for peer in peers if peer.machine == following != machine]


def stopped(peer: Peer) -> bool:
    """Whether the process of *peer*, on this machine and of this one's launcher, is stopped at this moment."""
    try:
        found = _stat(peer.pid)
        # Others may write to the store, and must not be able to name whom this process ends.
        return found[_BEGAN] == peer.began and found[_STATE] == "T" and found[_PARENT] == str(os.getppid())
    except (OSError, IndexError):
        return False


class Watch:
    """The threads of one rank.

    Args:
        store: that the ranks have met by, on a connection of its own.
        peer: this rank.
        size: number of ranks.
        where: the store is, for people.
        end: called with what was lost; ends this process.
    """

    def __init__(
        self, store: dist.Store, peer: Peer, size: int, where: str, end: Callable[[str], None] | None = None
    ) -> None:
        self._store = dist.PrefixStore("hyperep/watch", store)
        self._peer, self._where = peer, where
        self._over = threading.Event()
        self._end = end or (lambda lost: end_process(f"hyperep: error: rank {peer.rank}: {lost}\n", self._over))
        self._answers, self._closed, self._verdict = 0, "", ""
        self._signs: dict[int, int] = {}
        self._store.set(self._sign(peer.rank), "0")
        self._store.set(f"peer/{peer.rank}", json.dumps(asdict(peer)))
        if peer.rank == 0:
            self._store.set(_VERDICT, "")
        told = self._store.multi_get([f"peer/{rank}" for rank in range(size)])
        self._peers = [Peer(**json.loads(text)) for text in told]
        here = [p for p in self._peers if p.machine == peer.machine]
        self._beside = [p for p in here if p != peer]
        self._next = next_machine(self._peers, peer.machine) if here[0] == peer else []
        self._threads = [
            threading.Thread(target=work, name=f"hyperep-watch{work.__name__}", daemon=True)
            for work in (self._talk, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no more: this rank leaves, as it should. Idempotent."""
        if self._over.is_set():
            return
        self._over.set()
        for thread in self._threads:
            # A thread that comes back from PyTorch while the interpreter ends would take the process down with it.
            thread.join(_POLL)
        if not self._closed and not self._threads[0].is_alive():
            try:
                self._store.set(self._sign(self._peer.rank), str(_LEFT))
            except RuntimeError:
                self._closed = "closed"  # who held the store has left before

    def _talk(self) -> None:
        """Exchange signs of life with the store. This thread waits where the store does not answer."""
        keys = [_VERDICT, *(self._sign(peer.rank) for peer in self._next)]
        number = 0
        while not self._over.wait(_POLL):
            number += 1
            try:
                self._store.set(self._sign(self._peer.rank), str(number))
                verdict, *signs = self._store.multi_get(keys)
            except RuntimeError as error:  # PyTorch's errors of its stores are all of this kind
                self._closed = str(error)
                return
            self._verdict = verdict.decode()
            self._signs = {peer.rank: int(sign) for peer, sign in zip(self._next, signs, strict=True)}
            self._answers = number

    def _judge(self) -> None:
        """Say what is lost, and end."""
        clock = RunningClock(gap=2 * _POLL)
        answers, signs = LateRanks(LOST_SECONDS, clock), LateRanks(LOST_SECONDS, clock)
        still = LateRanks(STOPPED_SECONDS, clock)
        running = {peer.rank: 0 for peer in self._beside}  # how often it was seen to run
        while not self._over.wait(_POLL / 2):
            running = {p.rank: running[p.rank] + (not stopped(p)) for p in self._beside}
            late = [self._peers[rank] for rank in still(running)]
            if all(peer in late for peer in self._beside if peer.rank < self._peer.rank):  # the first that can
                for peer in late:
                    self._end_stopped(peer)
            if self._verdict:
                return self._end(self._verdict)
            unreachable = any(words in self._closed.lower() for words in _UNREACHABLE)
            if not self._closed or unreachable:
                if answers({0: self._answers}):
                    return self._end(f"lost {self._machine(self._peers[0])}: {self._where} does not answer any more")
                staying = {rank: sign for rank, sign in self._signs.items() if sign != _LEFT}
                if staying and len(signs(staying)) == len(staying):
                    lost = f"lost {self._machine(self._next[0])}: no sign of life for {LOST_SECONDS:g} s"
                    self._say(lost)
                    return self._end(lost)

    def _end_stopped(self, peer: Peer) -> None:
        lost = f"rank {peer.rank} was stopped (SIGSTOP or the like, from outside) and not continued; it is ended"
        self._say(lost)
        if stopped(peer):
            os.write(2, f"hyperep: error: {lost}\n".encode())
            os.kill(peer.pid, signal.SIGKILL)

    def _say(self, lost: str) -> None:
        """Make it known to the ranks of all machines, if the store can be reached."""
        if not self._closed:
            threading.Thread(target=self._store.set, args=(_VERDICT, lost), daemon=True).start()

    def _machine(self, peer: Peer) -> str:
        ranks = [str(p.rank) for p in self._peers if p.machine == peer.machine]
        return f"the machine {peer.machine} with rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} of {len(self._peers)}"

    @staticmethod
    def _sign(rank: int) -> str:
        return f"sign/{rank}"


_STATE, _PARENT, _BEGAN = 0, 1, 19
"""Places after the name in ``/proc/PID/stat``."""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            raise
        return [""] * (_BEGAN + 1)  # a system without /proc: nobody is seen to be stopped
