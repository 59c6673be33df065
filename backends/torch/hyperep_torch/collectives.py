# SPDX-License-Identifier: Apache-2.0
"""Raw collectives: never recorded by autograd, contiguous inputs, fresh outputs.

Each one is issued asynchronously and then waited for. On accelerators the wait blocks the current stream and not the
host, and it is what makes the result visible there on every backend: HCCL, unlike NCCL, does not order a blocking call
before the work that follows it.

A group of one rank needs no communication; its collectives are copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hyperep.platform.splits import row_splits
from hyperep_torch.groups import group_size

__all__ = ["TorchWork", "all_gather", "all_reduce", "all_to_all_single", "broadcast", "reduce_scatter"]

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class TorchWork:
    """A collective under way; keeps its buffers alive until it is waited for."""

    __slots__ = ("_handle", "_output", "_sent")

    def __init__(self, output: torch.Tensor, handle: Any = None, sent: torch.Tensor | None = None) -> None:
        self._output = output
        self._handle = handle
        self._sent = sent

    def wait(self) -> torch.Tensor:
        """The result, once the current stream may use it; the same tensor at every call."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = self._sent = None
        return self._output


def all_to_all_single(
    x: torch.Tensor, output_splits: Sequence[int] | None, input_splits: Sequence[int] | None, group: Any
) -> TorchWork:
    """Exchange rows; ``None`` splits evenly.

    Raises:
        ValueError: splits of the wrong number, negative, or that do not sum to the rows.
    """
    size = group_size(group)
    rows = x.shape[0]
    sent = row_splits("input_splits", input_splits, size, rows)
    received = row_splits("output_splits", output_splits, size, None if output_splits is not None else rows)
    if sum(sent) != rows:
        raise ValueError(f"input_splits={sent} sum to {sum(sent)}, but there are {rows} rows; they must be equal")
    if size == 1:
        if sent != received:
            raise ValueError(
                f"input_splits={sent} and output_splits={received} differ, but the only rank sends to itself"
            )
        return TorchWork(_fresh(x))
    x = x.detach().contiguous()
    output = x.new_empty((sum(received), *x.shape[1:]))
    return TorchWork(output, dist.all_to_all_single(output, x, received, sent, group=group, async_op=True), x)


def all_gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Rows of all ranks, in rank order."""
    size = group_size(group)
    if size == 1:
        return _fresh(x)
    x = x.detach().contiguous()
    output = x.new_empty((size * x.shape[0], *x.shape[1:]))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return TorchWork(output, gather(output, x, group=group, async_op=True), x).wait()


def reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum over ranks, of which each keeps its part of the rows.

    Raises:
        ValueError: the rows do not divide evenly.
    """
    size = group_size(group)
    rows = row_splits("reduce_scatter", None, size, x.shape[0])[0]
    if size == 1:
        return _fresh(x)
    x = x.detach().contiguous()
    output = x.new_empty((rows, *x.shape[1:]))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    return TorchWork(output, scatter(output, x, group=group, async_op=True), x).wait()


def all_reduce(x: torch.Tensor, group: Any, op: str) -> torch.Tensor:
    """Reduce over ranks.

    Raises:
        ValueError: *op* is none of sum, max and min.
    """
    if op not in _REDUCE_OPS:
        raise ValueError(f"all_reduce(op={op!r}): choose one of {sorted(_REDUCE_OPS)}")
    output = _fresh(x)
    if group_size(group) == 1:
        return output
    return TorchWork(output, dist.all_reduce(output, _REDUCE_OPS[op], group=group, async_op=True)).wait()


def broadcast(x: torch.Tensor, source: int, group: Any) -> torch.Tensor:
    """The tensor of the group's rank *source*.

    Raises:
        ValueError: the group has no such rank.
    """
    size = group_size(group)
    if not 0 <= source < size:
        raise ValueError(f"broadcast(source={source}): the group has ranks 0 to {size - 1}")
    output = _fresh(x)
    if size == 1 or x.is_meta:  # there is nothing to send yet
        return output
    return TorchWork(output, dist.broadcast(output, group=group, group_src=source, async_op=True)).wait()


def _fresh(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)
