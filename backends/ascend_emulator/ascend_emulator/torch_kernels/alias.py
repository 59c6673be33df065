# SPDX-License-Identifier: Apache-2.0
"""Two views of the same bytes: the emulated device's memory is host memory, so that the CPU can work on it."""

import ctypes

import torch


def is_npu(value: object) -> bool:
    """Whether a value is a tensor on an emulated device."""
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def alias(value: object) -> object:
    """The CPU tensor over the bytes of an NPU tensor, with its offset, sizes and strides; anything else unchanged.

    Host synchronisation is the caller's business: what is still in a stream's queue has not happened to these bytes.
    """
    if not is_npu(value):
        return value
    tensor: torch.Tensor = value  # type: ignore[assignment]
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    whole = torch.empty(0, dtype=tensor.dtype)
    return whole.set_(raw.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def upload(value: object, device: torch.device) -> object:
    """A CPU tensor's copy on an emulated device, with its strides; anything else unchanged."""
    if not (isinstance(value, torch.Tensor) and value.device.type == "cpu"):
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    if value.numel():
        alias(made).copy_(value)  # type: ignore[union-attr]
    return made
