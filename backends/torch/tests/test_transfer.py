# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device."""

import numpy as np
import pytest
import torch
from hyperep_torch import transfer

ARRAYS = {
    "float64": np.linspace(-1, 1, 6).reshape(2, 3),
    "float32, transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "float16": np.array([1.5, -2.5], np.float16),
    "int64": np.array([2**40 + 1, -3]),
    "int32, reversed": np.arange(5, dtype=np.int32)[::-1],
    "uint8": np.array([255, 1, 7], np.uint8),
    "bool": np.array([[True], [False]]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.int32),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_a_round_trip_keeps_dtype_shape_and_values(platform, array):
    (back,) = platform.to_host(platform.from_host(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array)


def test_neither_side_sees_later_changes(platform):
    array = np.ones(3, np.float32)
    tensor = platform.from_host(array)
    array[:] = 2
    (back,) = platform.to_host(tensor)
    tensor += 5
    assert back.tolist() == [1, 1, 1]
    assert tensor.tolist() == [6, 6, 6]
    back[0] = 9  # owns its memory, and may be written


def test_a_read_only_array_is_copied_without_a_warning(platform, recwarn):
    array = np.arange(3)
    array.setflags(write=False)
    assert platform.from_host(array).tolist() == [0, 1, 2]
    assert not recwarn.list


def test_to_host_leaves_autodiff_and_widens_bfloat16(platform):
    x = torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True)
    (host,) = platform.to_host(x * 2)
    assert host.dtype == np.float32
    assert host.tolist() == [2.0, 5.0]
    assert platform.to_host() == ()


def test_packing_puts_every_tensor_into_one_buffer():
    # The odd bytes of the first tensors leave the wider ones after them unaligned.
    tensors = [torch.from_numpy(np.array(a)) for a in sorted(ARRAYS.values(), key=lambda a: a.itemsize)]
    tensors.append(torch.arange(6.0).reshape(2, 3).t())
    buffer = transfer.pack(tensors)
    assert buffer.dtype == torch.uint8
    assert buffer.numel() == sum(t.numel() * t.element_size() for t in tensors)
    for tensor, array in zip(tensors, transfer.unpack(buffer.numpy(), tensors), strict=True):
        assert array.dtype == tensor.numpy().dtype
        assert np.array_equal(array, tensor.numpy())
        assert array.flags.owndata
        assert array.flags.aligned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_transfer_brings_everything_from_cuda():
    device = torch.device("cuda", 0)
    tensors = [transfer.from_host(array, device) for array in ARRAYS.values()]
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        arrays = transfer.to_host(tensors, device)
    assert sum("DtoH" in event.name for event in profile.events()) == 1
    for array, expected in zip(arrays, ARRAYS.values(), strict=True):
        assert np.array_equal(array, expected)
