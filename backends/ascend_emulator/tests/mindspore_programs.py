# SPDX-License-Identifier: Apache-2.0
"""What the ranks of these tests run; each function is called on every rank with that rank's platform."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from ascend_emulator import told
from hyperep_mindspore.platform import join
from mindspore import Tensor, mint, ops


def rows(rank: int, count: int) -> np.ndarray:
    """Rank *rank*'s rows: different on each rank."""
    return (np.arange(2 * count).reshape(count, 2) + 100 * rank).astype(np.float32)


def read_twice(platform: Any) -> tuple[bool, bool]:
    """Whether a collective's result is right before it is waited for, and after."""
    group = platform._group(None).name
    expected = np.concatenate([rows(rank, 3) for rank in range(platform.world_size)])
    x = Tensor(rows(platform.rank, 3))
    output = ops.zeros(expected.shape, x.dtype)
    output.asnumpy()
    os.environ["EMULATED_NPU_DELAY_MS"] = "300"
    try:
        handle = mint.distributed.all_gather_into_tensor(output, x, group=group, async_op=True)
        early = (output + 0.0).asnumpy()
        handle.wait()
        late = (output + 0.0).asnumpy()
    finally:
        os.environ["EMULATED_NPU_DELAY_MS"] = "0"
    return bool((early == expected).all()), bool((late == expected).all())


def disagree(platform: Any) -> None:
    """Rank 0 sends two rows to rank 1, which expects three."""
    group = platform._group(None).name
    sends, receives = ([1, 2], [1, 1]) if platform.rank == 0 else ([1, 1], [3, 1])
    output = ops.zeros((sum(receives), 4), Tensor(0.0).dtype)
    x = Tensor(np.ones((sum(sends), 4), np.float32))
    mint.distributed.all_to_all_single(output, x, receives, sends, group=group, async_op=True).wait()
    output.asnumpy()


def reduce_unlisted(platform: Any) -> str:
    """What is said to products of a type that HCCL adds up, and does not multiply."""
    x = Tensor(np.ones((2, 2), np.int16))
    try:
        mint.distributed.all_reduce(x, op="prod", group=platform._group(None).name)
        return f"reduced: {x.asnumpy()}"
    except RuntimeError as error:
        return str(error)


def reduce_booleans(platform: Any) -> tuple[list[int], list[int], list[int]]:
    """The bytes of whether any, all and a number of ranks say so: all ranks, the first one, and nobody.

    HCCL has no booleans, and MindSpore hands it those bytes as int8, which it adds up: two ranks make a 2, which NumPy
    takes for true, and 256 ranks make a false.
    """
    said = platform.from_host(np.array([True, platform.rank == 0, False]))
    return tuple(platform.all_reduce(said, op=op).asnumpy().view(np.uint8).tolist() for op in ("max", "min", "sum"))


def told_buffers(platform: Any) -> list[list[str]]:
    """What the device says of the buffers of a group of two ranks with 50 MB, and of another one as HCCL has it."""
    return told.told_buffers(join, [0, 1], [1, 2])
