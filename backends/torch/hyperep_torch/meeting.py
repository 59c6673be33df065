# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a launch meet: the store of the process group, as the environment says."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hyperep.launch.launcher import MEETING_VARIABLE
from hyperep.launch.tasks import integer, task_of

__all__ = ["Meeting", "find_meeting", "local_rank"]

_ADDRESS, _PORT = "MASTER_ADDR", "MASTER_PORT"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A launch, and this process's place in it."""

    rank: int
    size: int
    folder: Path | None = None
    """Of a world that hyperep started: its ranks meet by a file there."""
    address: str = ""
    port: int = 0

    @property
    def is_supervised(self) -> bool:
        """Whether hyperep started the ranks, and sees to them from outside."""
        return self.folder is not None

    def another_store(self, timeout: timedelta) -> dist.Store:
        """The store once more, on a connection of its own: a wait on one holds up all other calls on it."""
        store = dist.TCPStore(self.address, self.port, self.size, False, timeout=timeout)
        return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def store(self, timeout: timedelta) -> dist.Store:
        """Join the others' store, or open it for them."""
        if self.folder is not None:
            return dist.FileStore(str(self.folder / "torch"), self.size)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's agent serves it, one for all attempts.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.TCPStore(self.address, self.port, self.size, False, timeout=timeout)
            return dist.PrefixStore(f"/worker/attempt_{attempt}", store)
        if self.rank == 0 and self.address in _LOOPBACK:
            # PyTorch's own would listen on every address of this machine.
            return dist.TCPStore(
                self.address,
                self.port,
                self.size,
                is_master=True,
                timeout=timeout,
                master_listen_fd=_listen(self.address, self.port),
            )
        return dist.TCPStore(self.address, self.port, self.size, self.rank == 0, timeout=timeout)


def find_meeting(environment: Mapping[str, str]) -> Meeting | None:
    """The launch that *environment* describes: torchrun's, or one of srun or mpirun; ``None`` without any.

    Raises:
        ValueError: it describes half of one, or a variable holds no number or one that is out of range.
    """
    if "RANK" in environment:
        missing = [name for name in ("WORLD_SIZE",) if name not in environment]
        if MEETING_VARIABLE not in environment:
            missing += [name for name in (_ADDRESS, _PORT) if name not in environment]
        if missing:
            raise ValueError(
                f"the environment has RANK={environment['RANK']!r} but not {', '.join(missing)}; launch with torchrun, "
                "which sets them all, or unset RANK to run a single rank"
            )
        size = integer(environment, "WORLD_SIZE", at_least=1)
        rank = integer(environment, "RANK", below=size, below_name="WORLD_SIZE")
        if MEETING_VARIABLE in environment:
            return Meeting(rank=rank, size=size, folder=Path(environment[MEETING_VARIABLE]))
        return Meeting(rank=rank, size=size, address=environment[_ADDRESS], port=_port(environment))
    task = task_of(environment)
    if task is None:
        return None
    missing = [name for name in (_ADDRESS, _PORT) if name not in environment]
    if missing:
        raise ValueError(
            f"this process is task {task.rank} of {task.size} that {task.launcher} started ({task.told_by}), but "
            f"{' and '.join(missing)} do not say where its tasks meet; set {_ADDRESS} to the machine of task 0 and "
            f"{_PORT} to a port that is free there, the same for all tasks, or start one task with {task.launcher}"
        )
    return Meeting(rank=task.rank, size=task.size, address=environment[_ADDRESS], port=_port(environment))


def local_rank(environment: Mapping[str, str]) -> int | None:
    """This process's number on this machine, if its launcher says it."""
    if "LOCAL_RANK" in environment:
        return integer(environment, "LOCAL_RANK")
    task = None if "RANK" in environment else task_of(environment)
    return None if task is None else task.local_rank


def _port(environment: Mapping[str, str]) -> int:
    return integer(environment, _PORT, at_least=1, below=1 << 16, below_name="the number of ports")


def _listen(address: str, port: int) -> int:
    """File descriptor of a socket that listens at *address* alone; the store closes it."""
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(socket.SOMAXCONN)
        return listener.detach()
