# SPDX-License-Identifier: Apache-2.0
"""The processes of a world, as their starter sees them: ranks with a channel, and helpers beside them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe
from typing import IO, Any

from hyperep.launch.doing import Doings
from hyperep.launch.messages import Hello
from hyperep.launch.places import code_of
from hyperep.launch.plan import Auxiliary, RankProcess
from hyperep.launch.steps import StepCounts
from hyperep.launch.worker import STACKS_SIGNAL

__all__ = ["Helper", "Hosted"]

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hyperep.launch.worker import main; main(*map(int, sys.argv[2:]))"
)
"""The child gets this process's ``sys.path``, so that it finds the same programs and plugins."""
_BOOT_GUARD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from hyperep.launch.lifeline import become; become(int(sys.argv[2]), sys.argv[3:])"
)
_TAIL = 4000
"""Characters shown of what a process printed."""
_DUMP = 100_000
"""Characters kept of where its threads stood; a rank has many, and the interesting one may come first."""
_CRASHES = frozenset(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")
    if hasattr(signal, name)
)
"""Signals by which a process ends that did something wrong itself."""


class Child:
    """A process that this one started, in a process group of its own."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], quiet: bool, descriptors: Sequence[int]
    ) -> None:
        self._output: IO[bytes] | None = _scratch() if quiet else None
        self._popen = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output and subprocess.STDOUT,
            pass_fds=descriptors,
            process_group=0,
        )

    def returncode(self) -> int | None:
        """Its exit status, or ``None`` while it runs."""
        return self._popen.poll()

    def stopped_by(self) -> str:
        """Name of the signal by which it is stopped at this moment; empty if it is not, or this system cannot say."""
        if not hasattr(os, "waitid"):
            return ""
        try:
            state = os.waitid(os.P_PID, self._popen.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ""
        # A process in a debugger is trapped, which is none of our business.
        return signal.Signals(state.si_status).name if state is not None and state.si_code == os.CLD_STOPPED else ""

    def printed(self, characters: int = _TAIL) -> str:
        """The end of what it printed, if that was kept."""
        return "" if self._output is None else _tail(self._output, characters)

    def wait(self, end: float) -> None:
        """Wait for the end of the process until ``time.monotonic()`` is *end*."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(max(0.0, end - time.monotonic()))

    def kill(self) -> None:
        """End the process and what it started, and release what was kept of it."""
        try:
            # The whole group, so that what a rank started goes with it; also where the rank itself is gone already.
            os.killpg(self._popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._popen.kill()
        self._popen.wait()
        if self._output is not None:
            self._output.close()


class Helper(Child):
    """An auxiliary process."""

    def __init__(self, auxiliary: Auxiliary, shared: Mapping[str, str]) -> None:
        self.name = auxiliary.name
        guard = [sys.executable, "-c", _BOOT_GUARD, json.dumps(_search_path()), str(os.getpid())]
        super().__init__([*guard, *auxiliary.command], {**shared, **auxiliary.environment}, True, ())


class Hosted(Child):
    """A process of ranks."""

    def __init__(self, process: RankProcess, hello: Hello, quiet: bool, shared: Mapping[str, str]) -> None:
        self.ranks = process.ranks
        self._stacks: IO[bytes] = _scratch()
        self._steps: IO[bytes] = _scratch()
        self._doings: IO[bytes] = _scratch()
        self.own = code_of(type(hello.launcher))
        """Where the code of the plugin's author lies."""
        self._counts = StepCounts(self._steps.fileno())
        self.channel, theirs = Pipe()
        files = (self._stacks, self._steps, self._doings)
        numbers = [os.getpid(), theirs.fileno(), *(file.fileno() for file in files)]
        command = [sys.executable, "-c", _BOOT, json.dumps(_search_path()), *map(str, numbers)]
        super().__init__(command, {**shared, **process.environment}, quiet, numbers[1:])
        theirs.close()  # or the end of the child would not be the end of the channel
        self.send(hello)

    def send(self, message: Any) -> None:
        """Send *message*, unless the process has died: whoever collects its answer will find out and say so."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.channel.send(message)

    def steps(self) -> dict[int, int]:
        """How many steps each of its ranks has done."""
        return {rank: self._counts.read(position) for position, rank in enumerate(self.ranks)}

    def doing(self, rank: int) -> str:
        """What one of its ranks said last that it would do."""
        return Doings(self._doings.fileno()).read(self.ranks.index(rank))

    def ask_for_stacks(self) -> None:
        """Have the process write where its threads stand, if it lives and runs."""
        if self.returncode() is None:
            before = os.fstat(self._stacks.fileno()).st_size
            os.kill(self._popen.pid, STACKS_SIGNAL)
            end = time.monotonic() + 1.0
            while os.fstat(self._stacks.fileno()).st_size == before and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.05)  # the dump is written in pieces

    def stacks(self) -> str:
        """What it wrote there, also when it crashed."""
        return _tail(self._stacks, _DUMP)

    def epitaph(self) -> tuple[str, bool]:
        """How the process ended, and whether somebody else must have ended it."""
        self.wait(time.monotonic() + 1.0)
        status = self.returncode()
        if status is None or status >= 0:
            return f"exited with status {status} in the middle of a task", False
        name = signal.Signals(-status).name
        if -status in _CRASHES:
            return f"crashed with {name}", False
        by = ", from outside" if -status != signal.SIGKILL else ", from outside (by hand, or for lack of memory)"
        return f"killed by {name}{by}", True

    def kill(self) -> None:  # noqa: D102
        super().kill()
        self.channel.close()
        self._stacks.close()
        self._steps.close()
        self._doings.close()


def _scratch() -> IO[bytes]:
    return tempfile.TemporaryFile()  # closed by kill()


def _search_path() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]


def _tail(file: IO[bytes], characters: int = _TAIL) -> str:
    size = os.fstat(file.fileno()).st_size
    data = os.pread(file.fileno(), characters, max(0, size - characters))
    return data.decode(errors="replace")
