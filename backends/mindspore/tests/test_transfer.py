# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device: dtypes, ownership, and that tensors of several dtypes travel exactly together."""

import mindspore as ms
import numpy as np
import pytest
from hyperep_mindspore import transfer
from mindspore import ops


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 2), (2, 0)])
def test_there_and_back(platform, shape, dtype):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    (back,) = platform.to_host(platform.from_host(x))
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)


def test_both_sides_own_their_memory(platform):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = platform.from_host(x.T)
    x[:] = 0
    (copied,) = platform.to_host(tensor)
    np.testing.assert_array_equal(copied, np.arange(6).reshape(2, 3).T)
    assert copied.flags.owndata
    copied[:] = 0
    assert tensor.asnumpy().any()


def test_bfloat16_arrives_as_float32(platform):
    (x,) = platform.to_host(ops.cast(platform.xp.full((2,), 1.5), ms.bfloat16))
    assert x.dtype == np.float32
    assert x.tolist() == [1.5, 1.5]


def test_one_transfer_is_exact_for_mixed_dtypes(platform):
    """What accelerators use, held to the plain copies: large integers must not pass through floats."""
    arrays = [
        np.array([2**53 + 1, -1], np.int64),
        np.array([[1.5, -2.5]], np.float16),
        np.array([2**31 - 1], np.int32),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.array(np.pi, np.float64),
    ]
    results = transfer.to_host([platform.from_host(a) for a in arrays], "ascend")
    for result, expected in zip(results, arrays, strict=True):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(result, expected)
