# SPDX-License-Identifier: Apache-2.0
"""``World``: this process as one rank of what it is part of, and how it joins that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
from mindspore import communication, mint

from hyperep.launch.tasks import integer, refuse_tasks
from hyperep_mindspore.blas import warn_of_slow_kernels

__all__ = ["SELF", "World", "is_launched", "join_world"]

SELF = "hyperep_self"
"""The group of a rank that is alone: no communication is set up, and collectives are copies."""

_LAUNCH_VARIABLES = ("MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")
_DEVICES = {"cpu": "CPU", "ascend": "Ascend", "gpu": "GPU"}


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank, its device, and the group of all ranks."""

    rank: int
    size: int
    device: str
    """``"cpu"``, ``"ascend"`` or ``"gpu"``."""
    group: str
    """MindSpore's name of the group of all ranks, or ``SELF``."""


def join_world(device: str | None = None) -> World:
    """Join the communication that is set up, else the launch that the environment describes, else be a single rank.

    Args:
        device: ``"cpu"``, ``"ascend"`` or ``"gpu"``; by default the one that MindSpore is set to.

    Raises:
        ValueError: the device is unknown, or the environment describes half a launch, one with numbers that cannot be,
            or one of a scheduler that MindSpore does not join.
        RuntimeError: MindSpore is in graph mode.
        SystemExit: this process was msrun's scheduler, and its workers are done.
    """
    if ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise RuntimeError("MindSpore is in graph mode; hyperep needs ms.set_context(mode=ms.PYNATIVE_MODE)")
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        # msrun runs the user's program as the scheduler too, which is here that it has to stay until the workers end.
        communication.init()
        raise SystemExit(0)
    device = _choose(device)
    if device == "cpu":
        warn_of_slow_kernels()
    if not mint.distributed.is_initialized():
        if not is_launched(os.environ):
            refuse_tasks(os.environ, "MindSpore", "launch with msrun, or start one task")
            return World(rank=0, size=1, device=device, group=SELF)
        communication.init()
    size = communication.get_group_size()
    return World(
        rank=communication.get_rank(),
        size=size,
        device=device,
        group=communication.GlobalComm.WORLD_COMM_GROUP if size > 1 else SELF,
    )


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether *environment* describes this process as a worker of a launch (by msrun, for example).

    Raises:
        ValueError: it describes half of one, or one with numbers that cannot be.
    """
    if environment.get("MS_ROLE") != "MS_WORKER":
        return False
    missing = [name for name in _LAUNCH_VARIABLES if name not in environment]
    if missing:
        raise ValueError(
            f"the environment has MS_ROLE='MS_WORKER' but not {', '.join(missing)}; launch with msrun, which sets "
            "them all, or unset MS_ROLE to run a single rank"
        )
    size = integer(environment, "MS_WORKER_NUM", at_least=1)
    integer(environment, "MS_SCHED_PORT", at_least=1, below=1 << 16, below_name="the number of ports")
    for name in ("MS_NODE_ID", "RANK_ID"):
        if name in environment:
            integer(environment, name, below=size, below_name="MS_WORKER_NUM")
    return True


def _choose(device: str | None) -> str:
    current = str(ms.get_context("device_target"))
    if device is None:
        return current.lower()
    if device not in _DEVICES:
        raise ValueError(f"device={device!r}: choose one of {sorted(_DEVICES)}")
    if _DEVICES[device] != current:
        ms.set_device(_DEVICES[device])
    return device
