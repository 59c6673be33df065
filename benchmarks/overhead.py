# SPDX-License-Identifier: Apache-2.0
"""What the style, the hooks and the dispatch cost in Python: ``python benchmarks/overhead.py``.

A layer of tiny tensors on one rank, forward and backward, once as bare experts and once with ``ExpertParallel``
applied. No token travels and no product is of any size, so the difference is machinery. Printed are microseconds of
processor time of the calling thread, which other programs on the machine disturb least: the median and the least of
each, and the differences of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from hyperep_torch.platform import join

import hyperep
from hyperep.moe import GroupedExperts

REPETITIONS = 500


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    platform = join(device="cpu")
    bare, sharded = (GroupedExperts(platform, dim=8, hidden_dim=8, num_experts=4) for _ in range(2))
    hyperep.ExpertParallel().apply(sharded, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    tokens, cotangent = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
    indices, weights = torch.arange(32).view(16, 2) % 4, torch.rand(16, 2, requires_grad=True)

    def step(experts: torch.nn.Module) -> Callable[[], None]:
        def forward_backward() -> None:
            experts.zero_grad(set_to_none=True)
            tokens.grad = weights.grad = None
            experts(tokens, indices, weights, rows=32).backward(cotangent)

        return forward_backward

    steps = {"bare experts": step(bare), "with ExpertParallel": step(sharded)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(REPETITIONS + 50):
        for name, function in steps.items():
            begin = time.thread_time()
            function()
            if repetition >= 50:
                times[name].append((time.thread_time() - begin) * 1e6)
    figures = {name: (statistics.median(values), min(values)) for name, values in times.items()}
    figures["machinery"] = tuple(b - a for a, b in zip(*figures.values(), strict=True))
    for name, (median, least) in figures.items():
        print(f"{name:20} {median:6.0f} us  (least {least:.0f})")


if __name__ == "__main__":
    main()
