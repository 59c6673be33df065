# SPDX-License-Identifier: Apache-2.0
"""``World``: this process as one rank of what it is part of, and how it joins that."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hyperep_torch.device import KINDS, DeviceKind, choose_kind
from hyperep_torch.groups import SELF

__all__ = ["DEVICE_VARIABLE", "World", "ensure_process_group", "join_world"]

DEVICE_VARIABLE = "HYPEREP_TORCH_DEVICE"
"""Environment variable: the kind of device to use where the program does not say it."""

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank, its device, and the group of all ranks."""

    rank: int
    size: int
    kind: DeviceKind
    device: torch.device
    group: Any
    """PyTorch's default process group, or ``SELF`` for a rank that is alone."""
    timeout: timedelta
    """Deadline of the collectives of the groups that are made from here."""


def join_world(device: str | None = None, timeout: float = 600.0, kinds: Sequence[DeviceKind] = KINDS) -> World:
    """Join the process group that is there, else the launch that the environment describes, else be a single rank.

    Args:
        device: kind of device, ``"cpu"`` or ``"cuda"``. By default what ``HYPEREP_TORCH_DEVICE`` says; else that of the
            process group that is there; else CUDA where there is a CUDA device, and the CPU otherwise.
        timeout: deadline in seconds of collectives, for the groups that are made here.
        kinds: the kinds of devices to choose from, in order of preference.

    Raises:
        ValueError: the device is unknown or absent, the process group cannot serve it, or the environment describes
            half a launch.
    """
    deadline = timedelta(seconds=timeout)
    device = device or os.environ.get(DEVICE_VARIABLE) or None
    if dist.is_initialized():
        kind = _kind_of_default_group(device, kinds)
        return _world(kind, kind.bind(_local_rank()), deadline)
    kind = choose_kind(device, kinds)
    if not _is_launched():
        return World(rank=0, size=1, kind=kind, device=kind.bind(None), group=SELF, timeout=deadline)
    bound = kind.bind(_local_rank())
    # Naming the device lets NCCL connect at once, and derive sub-groups from the group of all.
    dist.init_process_group(kind.backend, timeout=deadline, device_id=bound if kind.splits_groups else None)
    atexit.register(_destroy)
    return _world(kind, bound, deadline)


def ensure_process_group(world: World) -> Any:
    """PyTorch's default process group. A rank that is alone gets one of its own, which needs no network."""
    if not dist.is_initialized():
        dist.init_process_group(world.kind.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=world.timeout)
        atexit.register(_destroy)
    return dist.group.WORLD


def _world(kind: DeviceKind, device: torch.device, timeout: timedelta) -> World:
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        kind=kind,
        device=device,
        group=dist.group.WORLD,
        timeout=timeout,
    )


def _kind_of_default_group(device: str | None, kinds: Sequence[DeviceKind]) -> DeviceKind:
    backend = dist.get_backend_config()  # such as "cpu:gloo,cuda:nccl"
    served = [kind for kind in kinds if f"{kind.type}:{kind.backend}" in backend.split(",")]
    if device is None and not served:
        raise ValueError(
            f"the process group has the backend {backend!r}, which serves none of "
            f"{[f'{kind.type}:{kind.backend}' for kind in kinds]}; set it up with one of these"
        )
    kind = choose_kind(device, served if device is None else kinds)
    if kind not in served:
        raise ValueError(
            f"device={device!r} needs the backend {kind.backend!r}, but the process group has {backend!r}; set it up "
            f"with backend='{kind.type}:{kind.backend}', or choose another device"
        )
    return kind


def _is_launched() -> bool:
    """Whether the environment describes a launch.

    Raises:
        ValueError: it describes half of one.
    """
    found = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    if "RANK" not in found:
        return False
    missing = [name for name in _LAUNCH_VARIABLES if name not in found]
    if missing:
        raise ValueError(
            f"the environment has RANK={os.environ['RANK']!r} but not {', '.join(missing)}; launch with torchrun, "
            "which sets them all, or unset RANK to run a single rank"
        )
    return True


def _local_rank() -> int | None:
    """This process's number on this machine, if the launcher says it; else the device stays as the program set it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def _destroy() -> None:
    # The program may have destroyed the group itself.
    if dist.is_initialized():
        dist.destroy_process_group()
