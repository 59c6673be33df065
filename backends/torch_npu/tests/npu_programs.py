# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the platform's tests run; each function is called on every rank with that rank's platform."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import parity
from ascend_emulator import told
from hyperep_torch.collectives import TorchWork
from hyperep_torch_npu.platform import join
from measure import relative, rows

from hyperep.exchange import chunks as in_chunks


def results(platform: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each collective gives on this rank, read at once, and what it must give."""
    size, rank = platform.world_size, platform.rank
    shape = (2 * size, 3)
    all_rows = [rows(source, *shape) for source in range(size)]
    own = slice(2 * rank, 2 * rank + 2)
    x = platform.from_host(all_rows[rank])
    total = np.sum(all_rows, axis=0)
    made: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
        "all_to_all_single": (lambda: platform.all_to_all_single(x), np.concatenate([r[own] for r in all_rows])),
        "all_gather": (lambda: platform.all_gather(x), np.concatenate(all_rows)),
        "reduce_scatter": (lambda: platform.reduce_scatter(x), total[own]),
        "all_reduce": (lambda: platform.all_reduce(x), total),
        "broadcast": (lambda: platform.broadcast(x, size - 1), all_rows[-1]),
    }
    return {name: (platform.to_host(collective())[0], expected) for name, (collective, expected) in made.items()}


@contextlib.contextmanager
def delayed(milliseconds: int) -> Iterator[None]:
    """The emulated streams wait before each copy and each collective."""
    os.environ["EMULATED_NPU_DELAY_MS"] = str(milliseconds)
    try:
        yield
    finally:
        os.environ["EMULATED_NPU_DELAY_MS"] = "0"


def results_are_visible(platform: Any) -> None:
    """What a collective returns can be used at once, however late the device is."""
    with delayed(100):
        for name, (found, expected) in results(platform).items():
            assert relative(found, expected) < 1e-6, name


def results_are_garbage_without_the_wait(platform: Any) -> None:
    """The rule that makes them visible is the wait of `TorchWork`; without it each collective is read too early."""
    with delayed(100), mock.patch.object(TorchWork, "wait", lambda self: self._output):
        found = results(platform)
        platform.barrier()
    wrong = {name for name, (value, expected) in found.items() if not relative(value, expected) < 1e-2}
    source = platform.rank == platform.world_size - 1  # the source of a broadcast has its rows already
    assert wrong == set(found) - ({"broadcast"} if source else set()), f"wrong without a wait: {sorted(wrong)}"


def chunks_agree_in_late_streams(platform: Any, chunks: int) -> None:
    """A layer in chunks reads nothing before it has come, forward and backward."""
    with delayed(30):
        parity.configured_layer_agrees(platform, "ep", platform.world_size, 1, "deepseek-v3", chunks)


def chunks_disagree_without_a_wait(platform: Any, exchange: str, backward: bool) -> None:
    """The check above notices each wait of rows that is left out: of either way, in forward or in backward."""
    chunks, original, seen = 3, getattr(in_chunks, exchange), 0

    def unwaited(x: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal seen
        work = original(x, *arguments, **options)
        if x.shape[1] == parity.DIM:  # and not the numbers of experts: those that were never written may be any
            seen += 1
            if (seen > chunks) == backward:
                return mock.Mock(wait=lambda: work._output)
        return work

    with mock.patch.object(in_chunks, exchange, unwaited), delayed(100):
        found = parity.errors(platform, "ep", platform.world_size, 1, "deepseek-v3", chunks=chunks)
        platform.barrier()
    assert seen > chunks
    wrong = {name for name, error in found.items() if not error < 1e-2}
    assert not (backward and "output" in wrong), found
    # A rank that others keep from going on may read so late that all has come.
    told = platform.all_reduce(platform.from_host(np.array([len(wrong)])))
    assert platform.to_host(told)[0][0] > 0, found


def sorted_dtypes(function: Callable[[], Any]) -> set[Any]:
    """The dtypes of what *function* sorts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator._opname in ("sort", "argsort"):
                found.add(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    with Watching():
        function()
    return found


def counted_operators(platform: Any, function: Callable[[], Any]) -> dict[str, int]:
    """How often *function* calls each operator of torch_npu."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, int] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator.namespace == "npu":
                calls[operator._opname] = calls.get(operator._opname, 0) + 1
            return operator(*args, **(kwargs or {}))

    with Counting():
        function()
    return calls


def told_buffers(platform: Any) -> list[list[str]]:
    """What the device says of the buffers of a group of the first two ranks, with 50 MB and as HCCL has it."""
    return told.told_buffers(join, [0, 1], [0, 1])
