# SPDX-License-Identifier: Apache-2.0
"""Ranks on this machine, started through torchrun's API.

torchrun's agent starts the ranks, watches them, and ends all of them when one fails. What it does not do is done here:
a deadline, the traceback of the rank that failed first, and the place where each of the others stood.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.platform.errors import RankFailure
from hyperep_torch.rank_process import FAILURE, STACK, run_rank

__all__ = ["TorchLauncher", "launcher"]

_GRACE = 5.0
"""Seconds between the deadline, at which a rank ends itself, and the moment at which it is killed from outside."""


class TorchLauncher(Launcher):
    """One process a rank, joined by ``torch.distributed``."""

    def joined(self) -> bool:
        """Whether torchrun, or anything that speaks like it, started this process as a rank of several."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ

    def plan(self, ranks: int) -> LaunchPlan:  # noqa: D102
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        return LaunchPlan(
            processes=tuple(
                RankProcess(ranks=(rank,), environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(ranks)
            )
        )

    def run(  # noqa: D102
        self,
        platform_name: str,
        program: str,
        arguments: Mapping[str, Any],
        ranks: int,
        *,
        deadline: float | None = None,
    ) -> Any:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        ends_at = None if deadline is None else time.time() + deadline
        with tempfile.TemporaryDirectory(prefix="hyperep-torch-") as reports:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",  # a free port
                local_addr="127.0.0.1",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=reports),
            )
            try:
                with _signal_handlers_kept(), _agent_silent(), _killed_after(deadline):
                    entry = elastic_launch(config, run_rank)
                    results = entry(self, platform_name, program, dict(arguments), reports, os.getpid(), ends_at)
            except ChildFailedError:
                raise RankFailure(_report(Path(reports), ranks, deadline)) from None
        return results[0]


def _report(reports: Path, ranks: int, deadline: float | None) -> str:
    """What happened: the rank that failed first, with its traceback, then every other rank."""
    failures = {int(f.suffix[1:]): f.read_text() for f in reports.glob(f"{FAILURE}.*")}
    stacks = {int(f.suffix[1:]): f.read_text().strip() for f in reports.glob(f"{STACK}.*")}
    died = sorted(rank for rank, stack in stacks.items() if not stack and rank not in failures)
    # The first line of a failure is its time. Errors of ranks that lost their peer come later than their cause.
    by_time = sorted(failures, key=lambda rank: int(failures[rank].split("\n", 1)[0]))
    order = [*died, *by_time, *sorted(set(range(ranks)) - {*died, *by_time})]
    late = not died and not failures and deadline is not None
    headline = f"{ranks} ranks were not done after {deadline:g} s" if late else f"rank {order[0]} of {ranks} failed"
    return "\n".join([headline, *(_rank_report(rank, failures.get(rank), stacks.get(rank)) for rank in order)])


def _rank_report(rank: int, failure: str | None, stack: str | None) -> str:
    if failure is not None:
        return f"--- rank {rank} raised\n{failure.split(chr(10), 1)[1].rstrip()}"
    if stack is None:
        return f"--- rank {rank} had not started"
    return (
        f"--- rank {rank} stood at\n{stack}" if stack else f"--- rank {rank} died without a trace (killed, or crashed)"
    )


@contextmanager
def _killed_after(seconds: float | None) -> Iterator[None]:
    """Kill the processes that are started inside the block and still live some time after *seconds*."""
    before = set(multiprocessing.active_children())

    def kill() -> None:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()

    timer = None if seconds is None else threading.Timer(seconds + _GRACE, kill)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


@contextmanager
def _agent_silent() -> Iterator[None]:
    """Keep torchrun's agent from logging a failure that is about to be raised with all that is known."""
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Give the process its signal handlers back; torchrun's agent installs its own, and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before: dict[int, Callable[..., Any] | int | None] = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


launcher = TorchLauncher()
