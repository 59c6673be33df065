# SPDX-License-Identifier: Apache-2.0
"""Real ranks for the tests: warm processes in one gloo world, each of which runs the functions that it is sent."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as mp

DEADLINE = 60.0
"""Seconds that one function may take."""


class Ranks:
    """A world of processes. ``run`` calls a function on every rank and returns the results in rank order."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(platform, *args)`` everywhere; it must be importable."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + DEADLINE
        waiting = dict(zip(self._pipes, range(self.world_size), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} gave no answer in {DEADLINE} s")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    results[rank], failure = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failure = "the process died"
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    # The others may wait for this one for ever.
                    deadline = min(deadline, time.monotonic() + 2.0)
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    from hyperep_torch.platform import join

    torch.set_num_threads(1)
    platform = None
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            platform = platform or join(device="cpu", timeout=DEADLINE)
            pipe.send((function(platform, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
