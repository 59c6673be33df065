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

from hyperep.launch.lifeline import die_with_parent
from hyperep.launch.timeout import step_timeout
from hyperep_torch.device import KINDS, DeviceKind, choose_kind
from hyperep_torch.groups import SELF
from hyperep_torch.leaving import leave, settle
from hyperep_torch.meeting import Meeting, find_meeting, local_rank
from hyperep_torch.watch import Watch, this_peer

__all__ = ["DEVICE_VARIABLE", "World", "ensure_process_group", "join_world"]

DEVICE_VARIABLE = "HYPEREP_TORCH_DEVICE"
"""Environment variable: the kind of device to use where the program does not say it."""


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


def join_world(device: str | None = None, timeout: float | None = None, kinds: Sequence[DeviceKind] = KINDS) -> World:
    """Join the process group that is there, else the launch that the environment describes, else be a single rank.

    Args:
        device: kind of device, ``"cpu"`` or ``"cuda"``. By default what ``HYPEREP_TORCH_DEVICE`` says; else that of the
            process group that is there; else CUDA where there is a CUDA device, and the CPU otherwise.
        timeout: deadline in seconds of collectives, for the groups that are made here; by default ``HYPEREP_TIMEOUT``,
            or ten minutes.
        kinds: the kinds of devices to choose from, in order of preference.

    Raises:
        ValueError: the device is unknown or absent, the process group cannot serve it, or the environment describes
            half a launch, or one with numbers that cannot be.
    """
    deadline = timedelta(seconds=step_timeout() if timeout is None else timeout)
    device = device or os.environ.get(DEVICE_VARIABLE) or None
    if dist.is_initialized():
        kind = _kind_of_default_group(device, kinds)
        # The group is its maker's to destroy; but meshes will hold it, so that its threads outlive that.
        atexit.unregister(settle)
        atexit.register(settle)
        return _world(kind, kind.bind(local_rank(os.environ)), deadline)
    kind = choose_kind(device, kinds)
    meeting = find_meeting(os.environ)
    if meeting is None:
        return World(rank=0, size=1, kind=kind, device=kind.bind(None), group=SELF, timeout=deadline)
    bound = kind.bind(local_rank(os.environ))
    store = meeting.store(deadline)
    # Naming the device lets NCCL connect at once, and derive sub-groups from the group of all.
    dist.init_process_group(
        kind.backend,
        store=store,
        rank=meeting.rank,
        world_size=meeting.size,
        timeout=deadline,
        device_id=bound if kind.splits_groups else None,
    )
    atexit.register(leave)
    if meeting.size > 1 and not meeting.is_supervised:
        _watch(meeting, deadline)
    return _world(kind, bound, deadline)


def ensure_process_group(world: World) -> Any:
    """PyTorch's default process group. A rank that is alone gets one of its own, which needs no network."""
    if not dist.is_initialized():
        dist.init_process_group(world.kind.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=world.timeout)
        atexit.register(leave)
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


def _watch(meeting: Meeting, timeout: timedelta) -> None:
    """Have this rank and the others see what becomes of each other, until this process ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torchrun's agent, which would end this rank if it could
    peer = this_peer(meeting.rank, meeting.address, meeting.port)
    where = f"the store at {meeting.address}:{meeting.port}"
    watch = Watch(meeting.another_store(timeout), peer, meeting.size, where)
    atexit.register(watch.stop)
