# SPDX-License-Identifier: Apache-2.0
"""The inside of a rank process: host the ranks, run one task after another, say what came of it."""

from __future__ import annotations

import faulthandler
import itertools
import os
import pkgutil
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from hyperep.launch.doing import Doings, telling
from hyperep.launch.lifeline import die_with_parent, end_process_group
from hyperep.launch.messages import Finished, Hello, Ready, Task, raised
from hyperep.launch.places import code_of
from hyperep.launch.steps import StepCounts, counting_steps

__all__ = ["STACKS_SIGNAL", "main"]

STACKS_SIGNAL = signal.SIGUSR1
"""Makes a rank process write the stack of each of its threads, also while it is stuck in native code."""


def main(parent: int, channel: int, stacks: int, steps: int, doings: int) -> None:
    """Host ranks until the parent says that there are no more tasks, or is gone.

    Args:
        parent: process id of the starter.
        channel: file descriptor of this end of the socket pair.
        stacks: file descriptor of the file for stack dumps.
        steps: file descriptor of the file where ranks count their steps.
        doings: file descriptor of the file where ranks say what they are about to do.
    """
    die_with_parent(parent)
    os.set_inheritable(channel, False)
    _write_stacks_to(stacks)
    _Worker(Connection(channel), stacks, StepCounts(steps), Doings(doings)).serve()


def _write_stacks_to(stacks: int) -> None:
    """Have stacks written to the file *stacks* when this process crashes, or when somebody asks by a signal.

    Done again, it takes the place of handlers that somebody else, such as a framework, has set since.
    """
    faulthandler.disable()
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.unregister(STACKS_SIGNAL)
    faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)


class _Worker:
    """The ranks of one process, one of which may run per thread, behind one channel."""

    def __init__(self, channel: Connection, stacks: int, counts: StepCounts, doings: Doings) -> None:
        self._channel = channel
        self._stacks = stacks
        self._counts = counts
        self._doings = doings
        self._sending = threading.Lock()
        self._hello: Hello = channel.recv()
        self._own = code_of(type(self._hello.launcher))
        self._tasks: dict[int, queue.SimpleQueue[Task | None]] = {
            rank: queue.SimpleQueue() for rank in self._hello.process.ranks
        }

    def serve(self) -> None:
        threading.Thread(target=self._receive, name="hyperep-lifeline", daemon=True).start()
        hello = self._hello
        try:
            hello.launcher.host(hello.process, self._rank, hello.platform_name)
        except BaseException as error:
            for rank in hello.process.ranks:
                self._send(raised(rank, error, self._own))
            raise

    def _receive(self) -> None:
        """Pass each task on to every rank; the end of the channel is the end of the parent."""
        while True:
            try:
                task = self._channel.recv()
            except (EOFError, OSError):
                end_process_group()
            for tasks in self._tasks.values():
                tasks.put(task)

    def _rank(self, platform: Any) -> None:
        """The life of one rank."""
        if len(self._hello.process.ranks) == 1:
            _write_stacks_to(self._stacks)  # the framework, which is here now, may have handlers of its own
        self._send(Ready(platform.rank, threading.get_ident()))
        position, steps = self._hello.process.ranks.index(platform.rank), itertools.count(1)
        with (
            counting_steps(lambda: self._counts.write(position, next(steps))),
            telling(lambda what: self._doings.write(position, what)),
        ):
            self._tasks_of(platform)

    def _tasks_of(self, platform: Any) -> None:
        while (task := self._tasks[platform.rank].get()) is not None:
            try:
                result = pkgutil.resolve_name(task.program)(platform, **task.arguments)
                self._send(Finished(platform.rank, result, time.monotonic()))
            except BaseException as error:
                self._send(raised(platform.rank, error, self._own))

    def _send(self, message: Any) -> None:
        with self._sending:
            self._channel.send(message)
