# SPDX-License-Identifier: Apache-2.0
"""What every rank runs: each shape in turn; rank 0's result is the benchmark's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from hyperep.bench import memory, theory, timeline
from hyperep.bench.case import Case
from hyperep.bench.counting import CountingPlatform
from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.naive import reason_against
from hyperep.bench.progress import show_progress
from hyperep.bench.shapes import Shape
from hyperep.bench.timeline import Watch
from hyperep.bench.timing import interleaved, wait
from hyperep.bench.way import Way
from hyperep.exchange.faults import dtype_bytes
from hyperep.mesh import init_device_mesh
from hyperep.platform.protocol import Platform

__all__ = ["count", "follow", "measure", "run"]


def run(
    platform: Platform[Any],
    shapes: Sequence[Mapping[str, Any]],
    repetitions: int,
    naive: bool,
    together: bool = False,
    way: Mapping[str, Any] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Measure each of *shapes* (fields of :class:`Shape`) in a *way* (fields of :class:`Way`). Collective.

    Workloads of one shape take turns with each other, so that their times compare, and with *together* all shapes do;
    they are then in memory at once.
    """
    mesh = init_device_mesh(platform, (platform.world_size,), ("ep",))
    chosen = [Shape(**fields) for fields in shapes]
    found = []
    with show_progress(platform.rank == 0) as progress:
        names = dict.fromkeys(shape.name for shape in chosen)
        for group in [chosen] if together else [[shape for shape in chosen if shape.name == name] for name in names]:
            cases = [Case(mesh, shape, Way(**way)) for shape in group]
            for case, record in zip(cases, measure(cases, repetitions, naive, progress), strict=True):
                counted, followed = (of(platform, case.shape, case.way) for of in (count, follow))
                found.append(record | counted | followed)
    return found


def measure(
    cases: Sequence[Case], repetitions: int, naive: bool, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Times of the layers of *cases* and of what each is compared with; all of them take turns."""
    platform, names = cases[0].platform, ", ".join(dict.fromkeys(case.shape.name for case in cases))
    reason = reason_against(platform) if naive else "not asked for"
    contestants: dict[tuple[int, str], Callable[[], Any]] = {}
    for number, case in enumerate(cases):
        case.check(naive=not reason)
        contestants |= {(number, name): function for name, function in case.contestants(naive=not reason).items()}
    times = interleaved(platform, contestants, repetitions, progress=functools.partial(progress, names))
    return [
        _record(case, {name: values for (of, name), values in times.items() if of == number}, reason)
        for number, case in enumerate(cases)
    ]


def _record(case: Case, times: Mapping[str, np.ndarray], reason: str) -> dict[str, Any]:
    median = {name: float(np.median(values)) for name, values in times.items()}
    layer = median["forward_backward"]
    return {
        "shape": case.shape.name,
        "workload": case.shape.workload,
        "ranks": case.mesh.size(),
        "exchange": case.way.exchange,
        "chunks": case.way.chunks,
        "balance": case.way.balance,
        "load": case.load.as_dict(),
        "forward_ms": median["forward"],
        "forward_backward_ms": layer,
        "limit_ms": median["limit"],
        "ratio_to_limit": layer / median["limit"],
        "rows_ms": median["rows"],
        "speedup_over_rows": median["rows"] / layer,
        "rows_limit_ms": median["rows_limit"],
        **{f"{name}_ms": median.get(name) for name in ("wire", "arithmetic", "waiting")},
        "speedup_over_waiting": median["waiting"] / layer if "waiting" in median else None,
        "plain_ms": median.get("plain"),
        "speedup_over_plain": median["plain"] / layer if "plain" in median else None,
        "naive_ms": median.get("naive"),
        "speedup_over_naive": median["naive"] / layer if "naive" in median else None,
        "naive_left_out": reason or None,
        "spread_ms": {name: np.percentile(values, (25, 75)).tolist() for name, values in times.items()},
        "saved_bytes": memory.of_worst_rank(
            case.platform,
            memory.saved_bytes(
                case.platform, case.layer.forward_recorded, list(case.layer.local_parameters().values())
            ),
        ),
        "peak_bytes": memory.of_worst_rank(
            case.platform,
            memory.peak_bytes(case.platform, lambda: wait(case.platform, case.layer.forward_backward())),
        ),
    }


def count(platform: Platform[Any], shape: Shape, way: Way | None = None) -> dict[str, Any]:
    """What the layer moves, summed over all ranks where it is bytes, and what it must move."""
    way = Way() if way is None else way
    counting: Any = CountingPlatform(platform)
    mesh = init_device_mesh(counting, (platform.world_size,), ("ep",))
    data = Data(counting, shape, platform.rank)
    layer = Layer(data, mesh, way.style)
    counting.take()
    pullback = layer.forward_recorded()
    forward = counting.take()
    wait(platform, pullback())
    backward = counting.take()
    sent = platform.from_host(np.array([forward.wire_bytes + backward.wire_bytes], dtype=np.int64))
    token_bytes, ranks = data.token_bytes, platform.world_size
    placement = way.placement(shape, ranks)
    copies = shape.copies(ranks) if placement is None else shape.placed_copies(placement)
    by_tokens = theory.token_wire_bytes(copies, shape.top_k, token_bytes, way.counted)
    if placement is not None:
        expert_bytes = 3 * shape.dim * shape.hidden * dtype_bytes(data.tokens.dtype)
        by_tokens += 2 * len(placement.copies) * expert_bytes  # weights, and their gradients
    by_rows = theory.row_wire_bytes(shape.counts(ranks), token_bytes)
    return {
        "host_copies": forward.host_copies + backward.host_copies,
        "collectives": {
            "forward": {"small": forward.small, "large": forward.large},
            "backward": {"small": backward.small, "large": backward.large},
        },
        "wire_bytes": int(platform.to_host(platform.all_reduce(sent))[0][0]),
        "wire_bytes_theory": by_tokens if way.exchange == "tokens" else by_rows,
        "wire_bytes_of_rows": by_rows,
    }


def follow(platform: Platform[Any], shape: Shape, way: Way) -> dict[str, Any]:
    """What was on its way while this rank computed, in one run; and if it is wanted, the timelines of all ranks."""
    spans, ends = _watched(platform, shape, way)
    found: dict[str, Any] = {
        "overlap_ms": timeline.overlap_ms(spans, ends[1]),
        "in_flight_bytes": timeline.most_in_flight(spans, ends[1]),
    }
    if way.timeline:
        both = [(f"{way.chunks} chunks", (spans, ends))] if way.chunks != 1 else []
        both.append(("waiting for each exchange", _watched(platform, shape, way.waiting)))
        found["timelines"] = [{"title": title, "ranks": timeline.gather(platform, *of)} for title, of in both]
    return found


def _watched(platform: Platform[Any], shape: Shape, way: Way) -> tuple[list[timeline.Span], tuple[float, float]]:
    watch: Any = Watch(platform)
    mesh = init_device_mesh(watch, (platform.world_size,), ("ep",))
    layer = Layer(Data(watch, shape, platform.rank), mesh, way.style)
    wait(platform, layer.forward_backward())
    ends = timeline.record(watch, layer.forward_recorded, functools.partial(wait, platform))
    return watch.spans, ends
