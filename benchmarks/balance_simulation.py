# SPDX-License-Identifier: Apache-2.0
"""The planner of balanced expert parallelism alone, at 64 to 1024 ranks, beside a scheme for placements that last.

    python benchmarks/balance_simulation.py --trace 256.npz --trace 1024.npz --picture balance.svg

takes two traces, of 256 and of 1024 experts with top-8, as ``hyperep train --record-trace --experts 256 --top-k 8``
leaves them, besides zipf loads. It prints a line of JSON for each load and number of ranks: the imbalance that is left
(rows of the fullest rank over the mean), how many experts' weights go to a rank on average, and from one rank at most,
and the time to plan. All are means over steps, of the time medians.

The scheme beside it is that of DeepSeek's EPLB, written from its description (https://github.com/deepseek-ai/EPLB, the
global policy): as often as there are spare slots, the expert with most load a replica gets one more, and each replica
is expected to get the same part of its load; then replicas are packed, heaviest first, onto the rank with least load
that has room. It is told the loads of the same step, which it could only have where it is computed as often as the
planner; and those of the step before, as where a placement is made from what was seen. It has no owners, so that nearly
all of its replicas are elsewhere each time: it is made for placements that last for many steps, and counts of weights
say what it would cost to use it for each.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.drawing import import_matplotlib
from hyperep.exchange.balance import plan
from hyperep.workloads import Trace, counts, read_trace

EXPERTS = {64: 256, 128: 256, 256: 256, 512: 1024, 1024: 1024}
"""Experts by ranks: each rank owns one at least."""
TOP_K = 8
TOKENS = 256
"""Of each rank."""
SLOTS = 2
MAX_IMBALANCE = 1.15
BEGIN = 20
"""Step of a recorded run before the first that is simulated: loads are least even after the warm-up."""
EXPERT_MB = 3 * 7168 * 2048 * 2 / 1e6
"""Weights of one expert of DeepSeek-V3, in bfloat16."""


def replicas_of(loads: np.ndarray, spare: int) -> np.ndarray:
    """How often each expert is there, int64 ``[E]``: *spare* replicas are added where a replica has most load."""
    found = np.ones(len(loads), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heap[0]
        found[expert] += 1
        heapq.heapreplace(heap, (-float(loads[expert]) / found[expert], expert))
    return found


def packed(weights: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each replica, int64: heaviest first, to the least loaded rank that has room for one more."""
    room, found = len(weights) // ranks, np.empty(len(weights), dtype=np.int64)
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    for replica in np.argsort(-weights, kind="stable"):
        load, taken, rank = heapq.heappop(heap)
        found[replica] = rank
        if taken + 1 < room:
            heapq.heappush(heap, (load + float(weights[replica]), taken + 1, rank))
    return found


def replicate_and_pack(loads: np.ndarray, ranks: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Expert and rank of each replica, for *loads* ``[E]``."""
    number = replicas_of(loads, ranks * slots)
    experts = np.repeat(np.arange(len(loads)), number)
    return experts, packed((loads / number)[experts], ranks)


def left_by(placement: tuple[np.ndarray, np.ndarray], loads: np.ndarray, ranks: int) -> float:
    """Imbalance where each replica gets the same part of its expert's load."""
    experts, at = placement
    rows = (loads / np.bincount(experts, minlength=len(loads)))[experts]
    of_rank = np.bincount(at, weights=rows, minlength=ranks)
    return float(of_rank.max() / of_rank.mean())


def moved(which: np.ndarray, at: np.ndarray, experts: int, ranks: int) -> dict[str, float]:
    """Weights of experts that go from owners to ranks: how many a rank gets on average, and the most that one sends."""
    which, at = np.unique(np.stack([which, at]), axis=1)  # two replicas on one rank are one
    owner = which // (experts // ranks)
    sent = np.bincount(owner[owner != at], minlength=ranks)
    return {"moved": float(sent.mean()), "most_sent": float(sent.max())}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and milliseconds of the processor: the machine may have other work."""
    times = []
    for _ in range(3):
        begin = time.thread_time()
        found = function()
        times.append((time.thread_time() - begin) * 1e3)
    return found, float(np.median(times))


def simulate(name: str, ranks: int, steps: int, trace: Trace | None) -> dict[str, Any]:
    """One record."""
    experts = EXPERTS[ranks]
    figures: dict[str, dict[str, list[float]]] = {}

    def note(way: str, **values: float) -> None:
        for key, value in values.items():
            figures.setdefault(way, {}).setdefault(key, []).append(value)

    before = None
    for step in range(BEGIN, BEGIN + steps + 1):
        sizes = {"tokens": TOKENS, "experts": experts, "top_k": TOP_K, "ranks": ranks}
        known = counts(name, **sizes, step=step, trace=trace)
        loads = known.sum(axis=0)
        if before is not None:
            placement, ms = timed(lambda: plan(known, slots=SLOTS, max_imbalance=MAX_IMBALANCE))  # noqa: B023
            mean = sum(placement.before) / ranks
            note("none", imbalance=max(placement.before) / mean)
            note("plan", imbalance=max(placement.loads) / mean, within=float(placement.within), ms=ms)
            copies = np.array([(copy.expert, copy.rank) for copy in placement.copies], dtype=np.int64).reshape(-1, 2)
            note("plan", **moved(*copies.T, experts, ranks))
            found, ms = timed(lambda: replicate_and_pack(loads, ranks, SLOTS))  # noqa: B023
            note("EPLB", imbalance=left_by(found, loads, ranks), ms=ms, **moved(*found, experts, ranks))
            stale = replicate_and_pack(before, ranks, SLOTS)
            note("EPLB, step before", imbalance=left_by(stale, loads, ranks))
        before = loads
    means = {
        way: {key: float((np.median if key == "ms" else np.mean)(values)) for key, values in of.items()}
        for way, of in figures.items()
    }
    for of in means.values():
        if "moved" in of:
            of["moved_MB"] = of["moved"] * EXPERT_MB
    return {
        "load": "recorded" if name == "trace" else name,
        "ranks": ranks,
        "experts": experts,
        "steps": steps,
        **means,
    }


def simulated(traces: dict[int, Trace], steps: int) -> Iterator[dict[str, Any]]:
    """All records."""
    for name in ("zipf", "trace"):
        for ranks, experts in EXPERTS.items():
            if name == "zipf" or experts in traces:
                yield simulate(name, ranks, steps, traces.get(experts))


LOOKS = {
    "none": ("without copies", "0.55", ":"),
    "EPLB, step before": ("replicate and pack, from the step before", "tab:orange", "--"),
    "EPLB": ("replicate and pack (EPLB), from the same step", "tab:orange", "-"),
    "plan": ("hyperep's plan", "tab:blue", "-"),
}
PANELS = {
    "imbalance": "rows of the fullest rank / mean",
    "moved": "experts sent, for one rank",
    "ms": "ms to plan a layer's step",
}


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """A row for each load, and a panel for each figure."""
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(record["load"] for record in records))
    figure = Figure(figsize=(12, 3.6 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), len(PANELS), squeeze=False)
    for row, name in zip(grid, names, strict=True):
        chosen = [record for record in records if record["load"] == name]
        ranks = [record["ranks"] for record in chosen]
        for axes, (key, label) in zip(row, PANELS.items(), strict=True):
            for way, (legend, color, style) in LOOKS.items():
                if key in chosen[0][way]:
                    values = [record[way][key] for record in chosen]
                    axes.plot(ranks, values, marker="o", label=legend, color=color, linestyle=style)
                    if key == "moved":
                        most = [record[way]["most_sent"] for record in chosen]
                        axes.plot(ranks, most, marker="^", color=color, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [f"{r}" for r in ranks])
            axes.set(xlabel="ranks", ylabel=label, title=f"{name} load")
            axes.grid(alpha=0.3)
            if key == "imbalance":
                axes.axhline(MAX_IMBALANCE, color="tab:green", linewidth=1, label=f"bound, {MAX_IMBALANCE:g}")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    handles, labels = grid[0][0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.2", marker="^", linestyle=":"))
    labels.append("most that one owner sends (middle)")
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Simulate, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", default=[], type=Path, help="recorded loads (repeatable)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    traces = {trace.experts: trace for trace in map(read_trace, arguments.trace)}
    records = []
    for record in simulated(traces, arguments.steps):
        print(json.dumps(record), flush=True)
        records.append(record)
    if arguments.picture:
        draw(records, arguments.picture)


if __name__ == "__main__":
    main()
