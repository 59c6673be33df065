# SPDX-License-Identifier: Apache-2.0
"""Raw collectives: never recorded by autograd, contiguous inputs, fresh outputs.

They are PyTorch's functional ones, operators from tensors to tensors: selective checkpointing can save what they
return, by the names that its users list anyway (``torch.ops._c10d_functional.all_to_all_single.default``), where a
collective that writes into a given tensor would hand out memory that recomputing never fills.

Each one is issued and then waited for. On accelerators the wait blocks the current stream and not the host, and it is
what makes the result visible there on every backend: HCCL, unlike NCCL, does not order a blocking call before the work
that follows it.

A group of one rank needs no communication; its collectives are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hyperep.platform.splits import row_splits
from hyperep_torch.absent import name_absent
from hyperep_torch.groups import group_size

__all__ = ["TorchWork", "all_gather", "all_reduce", "all_to_all_single", "broadcast", "reduce_scatter"]

_functional = torch.ops._c10d_functional
_REDUCE_OPS = ("max", "min", "sum")


class TorchWork:
    """A collective under way."""

    __slots__ = ("_group", "_output")

    def __init__(self, output: torch.Tensor, group: Any = None) -> None:
        self._output = output
        self._group = group
        """That of a collective which has not been waited for."""

    def wait(self) -> torch.Tensor:
        """The result, once the current stream may use it; the same tensor at every call."""
        if self._group is not None:
            self._output = _call(_wait, self._output, self._group)
            self._group = None
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
    return TorchWork(_call(_functional.all_to_all_single, _given(x), received, sent, group.group_name), group)


def all_gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Rows of all ranks, in rank order."""
    size = group_size(group)
    if size == 1:
        return _fresh(x)
    return TorchWork(_call(_functional.all_gather_into_tensor, _given(x), size, group.group_name), group).wait()


def reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum over ranks, of which each keeps its part of the rows.

    Raises:
        ValueError: the rows do not divide evenly.
    """
    size = group_size(group)
    row_splits("reduce_scatter", None, size, x.shape[0])
    if size == 1:
        return _fresh(x)
    return TorchWork(_call(_functional.reduce_scatter_tensor, _given(x), "sum", size, group.group_name), group).wait()


def all_reduce(x: torch.Tensor, group: Any, op: str) -> torch.Tensor:
    """Reduce over ranks.

    Raises:
        ValueError: *op* is none of sum, max and min.
    """
    if op not in _REDUCE_OPS:
        raise ValueError(f"all_reduce(op={op!r}): choose one of {list(_REDUCE_OPS)}")
    if group_size(group) == 1:
        return _fresh(x)
    return TorchWork(_call(_functional.all_reduce, _given(x), op, group.group_name), group).wait()


def broadcast(x: torch.Tensor, source: int, group: Any) -> torch.Tensor:
    """The tensor of the group's rank *source*.

    Raises:
        ValueError: the group has no such rank.
    """
    size = group_size(group)
    if not 0 <= source < size:
        raise ValueError(f"broadcast(source={source}): the group has ranks 0 to {size - 1}")
    if size == 1 or x.is_meta:  # there is nothing to send yet
        return _fresh(x)
    return TorchWork(_call(_functional.broadcast, _given(x), source, group.group_name), group).wait()


def _call(operator: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Call a collective; out of the graph, where one is made.

    The compiler can trace these operators, but that of PyTorch 2.11 then loses gradients without a word, where they are
    in the forward of a ``torch.autograd.Function``.
    """
    if not torch.compiler.is_compiling():
        return operator(*arguments)
    # Here, because it imports the compiler.
    from hyperep_torch.graph_break import call

    return call(operator, *arguments)


def _wait(output: torch.Tensor, group: Any) -> torch.Tensor:
    try:
        with torch._C._AutoDispatchBelowAutograd():  # there is nothing to record, and its way there is one of Python
            return _functional.wait_tensor(output)
    except RuntimeError as error:
        name_absent(error, group)
        raise


def _given(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous()


def _fresh(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)
