# SPDX-License-Identifier: Apache-2.0
"""Measures what chunks hide on this machine, for ``chunks="auto"`` to choose by."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperep.bench.apart import Apart
from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.progress import show_progress
from hyperep.bench.shapes import Shape
from hyperep.bench.timing import interleaved
from hyperep.bench.way import Way
from hyperep.exchange.calibration import CHUNKS, Calibration, Load
from hyperep.mesh import init_device_mesh
from hyperep.platform.protocol import Platform

__all__ = ["PROGRAM", "fit", "run"]

PROGRAM = "hyperep.bench.calibrate:run"


def run(platform: Platform[Any], shapes: Sequence[Mapping[str, Any]], repetitions: int) -> list[dict[str, Any]]:
    """Measure the first of *shapes* in every number of chunks; fields of one :class:`Calibration`. Collective."""
    shape, ranks = Shape(**shapes[0]), platform.world_size
    mesh = init_device_mesh(platform, (ranks,), ("ep",))
    data = Data(platform, shape, platform.rank)
    apart = Apart(mesh, shape, Way().style)
    contestants = {str(n): Layer(data, mesh, Way(chunks=n).style).forward_backward for n in CHUNKS}
    contestants |= {"wire": apart.wire, "arithmetic": apart.arithmetic}
    with show_progress(platform.rank == 0) as progress:
        times = interleaved(platform, contestants, repetitions, progress=functools.partial(progress, shape.name))
    median = {name: float(np.median(values)) for name, values in times.items()}
    load = Load(
        tokens=shape.tokens,
        top_k=shape.top_k,
        token_bytes=data.token_bytes,
        expert_numbers=3 * shape.dim * shape.hidden,
    )
    hidden, chunk_ms = fit(median["wire"], median["arithmetic"], {n: median[str(n)] for n in CHUNKS})
    found = Calibration(
        platform=platform.name,
        device=platform.device.partition(":")[0],
        ranks=ranks,
        bytes_per_ms=load.wire_bytes(ranks) / median["wire"] if ranks > 1 else 1e9,
        flops_per_ms=load.flops / median["arithmetic"],
        hidden=hidden,
        chunk_ms=chunk_ms,
    )
    return [{"shape": shape.name, "ms": median, "calibration": vars(found)}]


def fit(wire: float, arithmetic: float, times: Mapping[int, float]) -> tuple[float, float]:
    """``h`` and ``c`` of :mod:`hyperep.exchange.calibration`, least squares in their bounds.

    Args:
        wire: ms of the exchanges alone.
        arithmetic: ms of the rest alone.
        times: ms of the layer by number of chunks.
    """
    # Against the layer in one chunk, so that what wire and arithmetic cost together more than apart is in neither.
    chunks = np.array([n for n in sorted(times) if n > 1], dtype=np.float64)
    gained = np.array([times[1] - times[int(n)] for n in chunks])
    smaller = min(wire, arithmetic)
    both = np.stack([smaller * (1 - 1 / chunks), -(chunks - 1)], axis=1)
    candidates = [np.linalg.lstsq(both, gained, rcond=None)[0]]
    for fixed in (0, 1):  # on each edge of what is allowed
        other = both[:, 1 - fixed]
        edge = np.zeros(2)
        edge[1 - fixed] = float(other @ gained) / max(float(other @ other), 1e-30)
        candidates.append(edge)
    full = np.array([1.0, float(both[:, 1] @ (gained - both[:, 0])) / float(both[:, 1] @ both[:, 1])])
    allowed = [np.clip(of, [0.0, 0.0], [1.0, np.inf]) for of in (*candidates, full, np.zeros(2))]
    hidden, chunk_ms = min(allowed, key=lambda of: float(np.sum((both @ of - gained) ** 2)))
    return float(hidden), float(chunk_ms)
