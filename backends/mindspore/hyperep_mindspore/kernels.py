# SPDX-License-Identifier: Apache-2.0
"""Which of MindSpore's functions are used where the right one depends on the device: one table.

The CPU has kernels for many functions of :mod:`mindspore.ops` that :mod:`mindspore.mint` has none for. On Ascend it is
the other way round: functions of ``mint`` are CANN's ``aclnn`` operators, and those of ``ops`` may be of its older
interface, with fewer types and fewer promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mindspore import Tensor, mint, ops

__all__ = ["ASCEND", "CPU", "Kernels", "kernels_of"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Functions of one device."""

    argsort: Callable[[Tensor, int, bool], Tensor]
    """Of a tensor that is not empty, along an axis, descending or not; of equals the first stays first."""
    cumsum: Callable[[Tensor, int], Tensor]
    """Running sums along an axis, in the tensor's own dtype."""


CPU = Kernels(
    # MindSpore promises no order of equals; that this sort is stable, also when descending, is tested.
    argsort=lambda x, axis, descending: ops.argsort(x, axis, descending),
    cumsum=lambda x, axis: ops.cumsum(x, axis),
)
ASCEND = Kernels(
    # ops.argsort is CANN's older Sort, which keeps equals in order only where it is asked to, and is not asked.
    argsort=lambda x, axis, descending: mint.argsort(x, axis, descending, True),
    # ops.cumsum refuses int64 there.
    cumsum=lambda x, axis: mint.cumsum(x, axis),
)


def kernels_of(device: str) -> Kernels:
    """The functions for ``"cpu"``, ``"ascend"`` or ``"gpu"``."""
    return ASCEND if device == "ascend" else CPU
