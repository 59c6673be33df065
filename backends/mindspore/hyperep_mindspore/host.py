# SPDX-License-Identifier: Apache-2.0
"""NumPy on tensors that lie in the host's memory.

On the CPU a kernel of MindSpore costs some hundred microseconds before it begins, and its copies, of which it makes one
of every view, run at 20 to 60 ns an element. ``asnumpy`` and ``from_numpy`` copy nothing there. So what is large is
done by NumPy, inside of custom functions and off the tape. Two rules keep that safe:

* an array that is opened shares the memory of its tensor: it is read-only, and not kept beyond the call;
* a tensor that is made owns its memory: an array that is a view of another one is copied first.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

__all__ = ["copied", "from_array", "opened", "widened"]


def opened(tensor: Tensor) -> np.ndarray:
    """What *tensor* holds, read-only: its own memory where it is a whole one, else a copy. bfloat16 becomes float32."""
    whole = ops.cast(tensor, ms.float32) if tensor.dtype == ms.bfloat16 else tensor
    array = whole.asnumpy().view()  # waits for the operators that make it
    array.flags.writeable = False
    return array


def widened(tensor: Tensor) -> np.ndarray:
    """What *tensor* holds, read-only, in float32 at least: NumPy has no fast arithmetic of narrower floats."""
    array = opened(tensor)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def from_array(array: np.ndarray, dtype: ms.Type) -> Tensor:
    """A tensor of *array*, in *dtype*, that no other tensor shares memory with."""
    if dtype == ms.bfloat16:
        return ops.cast(from_array(array.astype(np.float32, copy=False), ms.float32), dtype)
    array = array.astype(ms.dtype_to_nptype(dtype), copy=False)
    owned = array.flags.owndata and array.flags.writeable and array.flags.c_contiguous
    return Tensor.from_numpy(array if owned else np.array(array, order="C"))


def copied(tensor: Tensor) -> Tensor:
    """A copy of *tensor* whose elements lie in the order of its dims."""
    return from_array(opened(tensor), tensor.dtype)
