# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["from_host", "pack", "to_host", "unpack"]


def from_host(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy *array* to *device*; the host does not wait, and may change the array afterwards."""
    tensor = torch.from_numpy(np.array(array, order="C"))
    if device.type == "cpu":
        return tensor
    # Only a copy from pinned memory is asynchronous; PyTorch keeps that memory until the copy has happened.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[np.ndarray, ...]:
    """Copy *tensors* to the host, in one transfer from a device that has its own memory; bfloat16 becomes float32."""
    sources = [t.detach().float() if t.dtype == torch.bfloat16 else t.detach() for t in tensors]
    if device.type == "cpu":
        return tuple(np.array(t.numpy(), order="C") for t in sources)
    if not sources:
        return ()
    return unpack(pack(sources).cpu().numpy(), sources)  # host sync here, and nowhere else


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of all *tensors*, one after the other, on their device: uint8 ``[sum of bytes]``."""
    return torch.cat([t.reshape(-1).contiguous().view(torch.uint8) for t in tensors])


def unpack(data: np.ndarray, like: Sequence[torch.Tensor]) -> tuple[np.ndarray, ...]:
    """Undo :func:`pack` on the host; shapes and dtypes are those of *like*. The results own their memory."""
    arrays, start = [], 0
    for tensor in like:
        stop = start + math.prod(tensor.shape) * tensor.element_size()
        # Other tensors' bytes before it may leave this one unaligned; the copy aligns it.
        arrays.append(data[start:stop].view(_numpy_dtype(tensor.dtype)).reshape(tensor.shape).copy())
        start = stop
    return tuple(arrays)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype
