# SPDX-License-Identifier: Apache-2.0
"""Real ranks for the tests: processes that run a function of `raw_programs`, and that end when this process does."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROGRAMS = Path(__file__).with_name("raw_programs.py")


@dataclass(frozen=True)
class Ended:
    """How a rank ended. `code` is None if it had to be killed at the deadline."""

    code: int | None
    output: str


def run(program: str, ranks: int, *, timeout: float = 120, extra: Mapping[str, str] | None = None) -> list[Ended]:
    """Run `raw_programs.<program>()` on every rank, and say how each ended. Returns within `timeout` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [_start(program, rank, ranks, port, extra or {}, output) for rank, output in enumerate(outputs)]
        deadline = time.monotonic() + timeout
        codes = [_wait_until(process, deadline) for process in processes]
        return [Ended(code, _all_of(output)) for code, output in zip(codes, outputs, strict=True)]


def _start(
    program: str, rank: int, ranks: int, port: int, extra: Mapping[str, str], output: IO[str]
) -> subprocess.Popen[bytes]:
    launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS), program],
        env={**os.environ, **launch, **meeting, **extra},
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=_die_with_parent,
    )


def _wait_until(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _all_of(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def succeed(program: str, ranks: int, **kwargs: object) -> list[Ended]:
    """Run a program that must succeed on every rank."""
    ended = run(program, ranks, **kwargs)  # type: ignore[arg-type]
    failed = {rank: end for rank, end in enumerate(ended) if end.code != 0}
    assert not failed, "\n".join(f"--- rank {rank}: {end.code}\n{end.output}" for rank, end in failed.items())
    return ended


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
