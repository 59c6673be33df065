# SPDX-License-Identifier: Apache-2.0
"""Raw collectives: never recorded, contiguous inputs, fresh outputs.

The CPU's collectives refuse empty tensors, booleans, and the sum of float64. A tensor is empty on all ranks of an
equally shaped collective at once, so that one is answered here; booleans travel as uint8, and are reduced as int32
everywhere, since HCCL reduces neither. The CPU has no all-to-all:
it is composed of sends and receives between pairs, which measured 1.3 to 5.7 times as fast as one all-gather of
padded rows (``docs/mindspore.md``). Other devices use their native operators.

Collectives return when the result is enqueued on the device's stream; MindSpore orders what follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from hyperep.platform.splits import row_splits
from hyperep_mindspore import host, private_names
from hyperep_mindspore.groups import Group
from hyperep_mindspore.kernels import kernels_of

__all__ = ["MindSporeWork", "all_gather", "all_reduce", "all_to_all_single", "broadcast", "reduce_scatter"]

_REDUCE_OPS = ("sum", "max", "min")


class MindSporeWork:
    """A collective under way; keeps its buffers alive until it is waited for."""

    __slots__ = ("_finish", "_output")

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._output: Tensor | None = None

    def wait(self) -> Tensor:
        """The result; the same tensor at every call."""
        if self._finish is not None:
            self._output, self._finish = private_names.off_tape(self._finish)(), None
        assert self._output is not None
        return self._output


@private_names.off_tape
def all_to_all_single(
    x: Tensor, output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, group: Group, device: str
) -> MindSporeWork:
    """Exchange rows; ``None`` splits evenly.

    Raises:
        ValueError: splits of the wrong number, negative, or that do not sum to the rows.
    """
    rows = x.shape[0]
    sent = row_splits("input_splits", input_splits, group.size, rows)
    received = row_splits("output_splits", output_splits, group.size, rows if output_splits is None else None)
    if sum(sent) != rows:
        raise ValueError(f"input_splits={sent} sum to {sum(sent)}, but there are {rows} rows; they must be equal")
    if sent[group.rank] != received[group.rank]:
        raise ValueError(
            f"input_splits={sent} and output_splits={received} differ at {group.rank}, what this rank sends to itself"
        )
    if group.size == 1:
        x = kernels_of(device).copied(x)
        return MindSporeWork(lambda: x)
    if x.dtype == ms.bool_:
        work = all_to_all_single(ops.cast(x, ms.uint8), received, sent, group, device)
        return MindSporeWork(lambda: ops.cast(work.wait(), ms.bool_))
    if device == "cpu":
        return _exchange_pairs(x, received, sent, group)
    x = kernels_of(device).copied(x)
    output = ops.zeros((sum(received), *x.shape[1:]), x.dtype)
    handle = mint.distributed.all_to_all_single(output, x, received, sent, group=group.name, async_op=True)
    return MindSporeWork(lambda: _waited(handle, output, x))


def _exchange_pairs(x: Tensor, received: Sequence[int], sent: Sequence[int], group: Group) -> MindSporeWork:
    """All-to-all by point-to-point messages: each rank begins with its successor, so that no rank is everybody's.

    Messages arrive in their places in the result: each is a tensor of its own, because the operators send from, and
    write to, the start of the storage, whatever the view.
    """
    dtype, rows = x.dtype, host.opened(x)
    result = np.empty((sum(received), *x.shape[1:]), rows.dtype)
    if not math.prod(x.shape[1:]):
        return MindSporeWork(lambda: host.from_array(result, dtype))
    here, there = _slices(sent), _slices(received)
    handles, messages, places = [], [], []
    for step in range(1, group.size):
        peer = (group.rank + step) % group.size
        if sent[peer]:
            messages.append(Tensor.from_numpy(rows[here[peer]].copy()))
            handles.append(private_names.send(messages[-1], peer, group.name, 0))
    for step in range(1, group.size):
        peer = (group.rank - step) % group.size
        if received[peer]:
            places.append(Tensor.from_numpy(result[there[peer]]))
            handles.append(private_names.receive(places[-1], 0, peer, group.name))
    result[there[group.rank]] = rows[here[group.rank]]

    def finish() -> Tensor:
        for handle in handles:
            handle[1].wait()
        for place in places:
            # Host sync here. MindSpore waits for all that was issued whenever a tensor is opened, but documents it not.
            place.asnumpy()
        messages.clear()
        return host.from_array(result, dtype)

    return MindSporeWork(finish)


def _slices(splits: Sequence[int]) -> list[slice]:
    stops = np.cumsum(splits).tolist()
    return [slice(stop - n, stop) for n, stop in zip(splits, stops, strict=True)]


@private_names.off_tape
def all_gather(x: Tensor, group: Group, device: str) -> Tensor:
    """Rows of all ranks, in rank order."""
    x = kernels_of(device).copied(x)
    if group.size == 1:
        return x
    if not x.size:
        return ops.zeros((group.size * x.shape[0], *x.shape[1:]), x.dtype)
    if x.dtype == ms.bool_:
        return ops.cast(all_gather(ops.cast(x, ms.uint8), group, device), ms.bool_)
    if device == "cpu":
        parts = [ops.zeros(x.shape, x.dtype) for _ in range(group.size)]
        mint.distributed.all_gather(parts, x, group=group.name)
        return ops.cat(parts, 0)
    output = ops.zeros((group.size * x.shape[0], *x.shape[1:]), x.dtype)
    handle = mint.distributed.all_gather_into_tensor(output, x, group=group.name, async_op=True)
    return _waited(handle, output, x)


@private_names.off_tape
def reduce_scatter(x: Tensor, group: Group, device: str) -> Tensor:
    """Sum over ranks, of which each keeps its part of the rows.

    Raises:
        ValueError: the rows do not divide evenly.
    """
    rows = row_splits("reduce_scatter", None, group.size, x.shape[0])[0]
    x = kernels_of(device).copied(x)
    if group.size == 1:
        return x
    if not x.size:
        return ops.zeros((rows, *x.shape[1:]), x.dtype)
    if device == "cpu":
        terms = all_to_all_single(x, None, None, group, device).wait()
        # [R, N/R, ...] -> [N/R, ...]
        total = kernels_of(device).sum(terms.reshape((group.size, rows, *x.shape[1:])), (0,), False)
        return ops.cast(total, x.dtype)
    output = ops.zeros((rows, *x.shape[1:]), x.dtype)
    handle = mint.distributed.reduce_scatter_tensor(output, x, group=group.name, async_op=True)
    return _waited(handle, output, x)


@private_names.off_tape
def all_reduce(x: Tensor, group: Group, op: str, device: str) -> Tensor:
    """Reduce over ranks.

    Raises:
        ValueError: *op* is none of sum, max and min.
    """
    if op not in _REDUCE_OPS:
        raise ValueError(f"all_reduce(op={op!r}): choose one of {sorted(_REDUCE_OPS)}")
    output = kernels_of(device).copied(x)
    if group.size == 1 or not output.size:
        return output
    if x.dtype == ms.bool_:
        return ops.cast(all_reduce(ops.cast(output, ms.int32), group, op, device), ms.bool_)
    if device == "cpu" and x.dtype == ms.float64:
        terms = all_gather(output.reshape((1, *x.shape)), group, device)  # [R, ...]
        return {"sum": ops.sum, "max": ops.amax, "min": ops.amin}[op](terms, 0)
    mint.distributed.all_reduce(output, op=op, group=group.name)
    return output


@private_names.off_tape
def broadcast(x: Tensor, source: int, group: Group, device: str) -> Tensor:
    """The tensor of the group's rank *source*.

    Raises:
        ValueError: the group has no such rank.
    """
    if not 0 <= source < group.size:
        raise ValueError(f"broadcast(source={source}): the group has ranks 0 to {group.size - 1}")
    output = kernels_of(device).copied(x)
    if group.size == 1 or not output.size:
        return output
    if x.dtype == ms.bool_:
        return ops.cast(broadcast(ops.cast(x, ms.uint8), source, group, device), ms.bool_)
    mint.distributed.broadcast(output, group.ranks[source], group=group.name)
    return output


def _waited(handle: Any, output: Tensor, sent: Tensor) -> Tensor:
    handle.wait()
    return output
