# SPDX-License-Identifier: Apache-2.0
"""``DeviceKind``: all that differs between CPU, CUDA and other accelerators, in one place.

An adapter for another device of PyTorch makes one more of these, and overrides in its subclass of ``TorchPlatform``
the members for which the device has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

__all__ = ["CPU", "CUDA", "KINDS", "DeviceKind", "choose_kind", "lies_on"]


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """A kind of device and the backend of ``torch.distributed`` that serves it."""

    type: str
    """As in ``torch.device(type)``."""
    backend: str
    """As in ``init_process_group(backend)``."""
    splits_groups: bool = False
    """Whether the backend can split a group. It must be, for a group of all that is bound to a device: PyTorch's meshes
    then make their groups by splitting it, and nothing else."""

    @property
    def module(self) -> ModuleType:
        """PyTorch's module for the device: ``torch.cpu``, ``torch.cuda``, ..."""
        return torch.get_device_module(self.type)

    @property
    def is_accelerator(self) -> bool:
        """Whether the device has a memory and an order of execution of its own."""
        return self.type != "cpu"

    def is_available(self) -> bool:
        """Whether a device of this kind answers."""
        return bool(self.module.is_available())

    def require(self, ranks: int) -> None:
        """Check that this machine has a device for each of *ranks* ranks.

        Raises:
            ValueError: it has fewer.
        """
        count = self.module.device_count() if self.is_accelerator else ranks
        if ranks > count:
            raise ValueError(
                f"local rank {ranks - 1} has no {self.type} device of its own: this machine has {count}; launch at "
                f"most {count} ranks here, or choose device='cpu' (HYPEREP_TORCH_DEVICE=cpu)"
            )

    def bind(self, local_rank: int | None) -> torch.device:
        """Make device number *local_rank* (the current one for ``None``) this process's device, and return it.

        Raises:
            ValueError: this machine has fewer devices.
        """
        if not self.is_accelerator:
            return torch.device(self.type)
        index = self.module.current_device() if local_rank is None else local_rank
        self.require(index + 1)
        self.module.set_device(index)
        return torch.device(self.type, index)


CPU = DeviceKind(type="cpu", backend="gloo")
CUDA = DeviceKind(type="cuda", backend="nccl", splits_groups=True)
KINDS = (CUDA, CPU)
"""In order of preference."""


def choose_kind(requested: str | None, kinds: Sequence[DeviceKind] = KINDS) -> DeviceKind:
    """The kind of device to use: the one asked for, else the first of *kinds* that is available.

    Raises:
        ValueError: there is no such kind, or no device of the kind that was asked for; nothing else is taken instead.
    """
    if requested is None:
        requested = next((kind.type for kind in kinds if kind.is_available()), kinds[0].type)
    found = next((kind for kind in kinds if kind.type == requested), None)
    if found is None:
        raise ValueError(f"device={requested!r} is unknown here; choose one of {[kind.type for kind in kinds]}")
    if not found.is_available():
        raise ValueError(f"device={requested!r} was asked for, but PyTorch sees no such device; choose another one")
    return found


def lies_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether the elements of *tensor* lie on *device*, one after the other: no sparse tensor, and no other device."""
    # "cuda" and "cuda:0" may be one device; which, only the current one could tell.
    same = tensor.device.index == device.index or device.index is None
    return tensor.layout == torch.strided and tensor.device.type == device.type and same
