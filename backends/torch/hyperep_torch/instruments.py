# SPDX-License-Identifier: Apache-2.0
"""What ``hyperep bench`` asks of PyTorch: bytes kept for backward, and the peak of memory in use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Instruments"]


@dataclass(frozen=True)
class Instruments:
    """See :mod:`hyperep.bench.memory`."""

    device: torch.device

    def saved_bytes(self, function: Callable[[], Any], parameters: Sequence[torch.Tensor]) -> int:
        """Call *function*; the bytes that autograd then keeps, each storage once, without those of *parameters*."""
        kept: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            graph = function()  # held until the end, so that no memory is used twice
        resident = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        total = sum(size for pointer, size in kept.items() if pointer not in resident)
        del graph
        return total

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """Call *function* and return by how much it raised the memory in use at most."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            function()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        # The profiler sees each allocation, and nothing else knows of those on the CPU.
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with _silent_stderr():
            profile.start()
        try:
            function()
        finally:
            with _silent_stderr():
                profile.stop()
        in_use = peak = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            in_use += event.nbytes()
            peak = max(peak, in_use)
        return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ writes to standard error: the profiler tells of its start and end there at any log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
