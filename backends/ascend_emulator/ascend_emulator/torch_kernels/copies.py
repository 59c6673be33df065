# SPDX-License-Identifier: Apache-2.0
"""Copies between tensors, of which those to the host may be asynchronous."""

import ctypes
from collections import deque
from functools import lru_cache

import torch

from ascend_emulator.torch_kernels.alias import alias, is_npu
from ascend_emulator.torch_kernels.order import wait_for_stream

DEVICE_TO_HOST = 2  # ACL_MEMCPY_DEVICE_TO_HOST

# Copies under way, each with the event behind it: their memory must live until the stream has passed.
_under_way: deque[tuple[torch.npu.Event, torch.Tensor, torch.Tensor]] = deque()


def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)` where one or both are on an emulated device.

    A non-blocking copy to the host is put into the current stream, as on hardware: whoever reads the target before the
    stream is synchronised reads what was in it before.
    """
    device = source.device if is_npu(source) else target.device
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if non_blocking and plain and is_npu(source) and not is_npu(target) and target.shape == source.shape:
        _enqueue(target, source, device)
        return target
    wait_for_stream(device)
    alias(target).copy_(alias(source))  # type: ignore[union-attr]
    return target


def to_copy(
    source: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """What `source.to(...)` calls when it must copy; with the same asynchronous copies to the host as `copy_`."""
    shape = torch.empty_strided(source.size(), source.stride(), dtype=dtype or source.dtype, device="meta")
    shape = torch.empty_like(shape, memory_format=memory_format or torch.preserve_format)
    target = torch.empty_strided(
        shape.size(),
        shape.stride(),
        dtype=shape.dtype,
        device=source.device if device is None else device,
        pin_memory=bool(pin_memory),
    )
    return copy_(target, source, non_blocking)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")  # loaded already, by torch_npu


def _enqueue(target: torch.Tensor, source: torch.Tensor, device: torch.device) -> None:
    while _under_way and _under_way[0][0].query():
        _under_way.popleft()
    stream = torch.npu.current_stream(device)
    size = ctypes.c_size_t(source.numel() * source.element_size())
    # `npu_stream` empties torch_npu's task queue before it gives the handle away, so that the order holds.
    _runtime().aclrtMemcpyAsync(
        ctypes.c_void_p(target.data_ptr()),
        size,
        ctypes.c_void_p(source.data_ptr()),
        size,
        DEVICE_TO_HOST,
        ctypes.c_void_p(stream.npu_stream),
    )
    event = torch.npu.Event()
    event.record(stream)
    _under_way.append((event, target.detach(), source.detach()))
