# SPDX-License-Identifier: Apache-2.0
"""How the cost of a layer grows with one of its sizes, as points to measure and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperep.bench.launch import start
from hyperep.bench.shapes import Shape
from hyperep.drawing import import_matplotlib
from hyperep.writable import require_writable_file

__all__ = ["SWEEPS", "Point", "draw", "points", "require_drawable", "swept"]

SWEEPS: Mapping[str, tuple[float, ...]] = {
    "experts": (16, 32, 64, 128, 256, 512),
    "tokens": (256, 512, 1024, 2048, 4096),
    "top-k": (1, 2, 4, 6, 8),
    "ranks": (1, 2, 4),
    "skew": (0.0, 0.125, 0.25, 0.375, 0.5),
}
"""The values that each sweep takes."""

_BYTES = ("top-k", "ranks")
"""Sweeps in which the two exchanges part, so that both are drawn, with their bytes."""

_LABELS = {
    "experts": "experts, at the same rows",
    "tokens": "tokens of each rank",
    "top-k": "experts of each token",
    "ranks": "ranks",
    "skew": "part of all rows for one hot expert",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement of a sweep."""

    value: float
    shape: Shape
    ranks: int
    line: str = "layer"
    """Points of one name are joined in the picture."""


def points(sweep: str, base: Shape, ranks: int) -> list[Point]:
    """What to measure for *sweep*, beginning from the shape *base*.

    Raises:
        ValueError: there is no such sweep, or it makes loads uneven by itself and so does the shape's workload.
    """
    if sweep == "skew" and base.workload != "uniform":
        raise ValueError(f"--sweep skew makes a workload of its own; leave out --workload {base.workload}")
    if sweep not in SWEEPS:
        raise ValueError(f"unknown sweep {sweep!r}; choose one of {', '.join(SWEEPS)}")
    found = []
    for value in SWEEPS[sweep]:
        if sweep == "ranks":
            # The same layer and the same tokens in all, so that each rank has less to do.
            shape = dataclasses.replace(base, tokens=base.tokens * ranks // int(value))
            found.append(Point(value, shape, int(value)))
        elif sweep == "skew":
            one = dataclasses.replace(base, hot=value)
            spread = dataclasses.replace(base, hot=value, hot_experts=base.experts // ranks)
            found.append(Point(value, one, ranks, "one hot expert"))
            found.append(Point(value, spread, ranks, "the same rows, spread over that rank's experts"))
        else:
            field = sweep.replace("-", "_")
            found.append(Point(value, dataclasses.replace(base, **{field: int(value)}), ranks))  # type: ignore[arg-type]
    return found


def swept(
    sweep: str, base: Shape, *, platform_name: str | None, ranks: int | None, **how: Any
) -> list[dict[str, Any]] | None:
    """Measure the points of *sweep*; arguments and errors as for :func:`start`.

    Points of the same number of ranks take turns, so that a change of the machine's speed meets all of them.
    """
    planned = points(sweep, base, ranks or 2)
    records: list[dict[str, Any]] = []
    for count in dict.fromkeys(point.ranks for point in planned):
        shapes = [point.shape for point in planned if point.ranks == count]
        found = start(shapes, platform_name=platform_name, ranks=count, together=True, **how)
        if found is None:
            return None
        records += found
    return [{**r, "sweep": sweep, "value": p.value, "line": p.line} for p, r in zip(planned, records, strict=True)]


def require_drawable(path: Path, option: str = "--picture") -> None:
    """Check, before anything is measured, that a picture can be written to *path*.

    Raises:
        ValueError: its folder is missing, it cannot be written, or its name is that of no format.
    """
    require_writable_file(path, option)
    try:
        import_matplotlib()
        from matplotlib.backend_bases import FigureCanvasBase
    except Exception:
        return  # it will be told when there is something to draw: until then the measurements need no picture
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise ValueError(f"{option} {path}: {path.suffix[1:]!r} is no format of pictures; choose one of {formats}")


def draw(sweep: str, records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write the picture of what :func:`swept` returned; its format is that of the name of *path*."""
    import_matplotlib()
    from matplotlib.figure import Figure

    with_bytes = sweep in _BYTES
    figure = Figure(figsize=(11 if with_bytes else 7, 4.2), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if with_bytes else 1, squeeze=False)[0]
    for line in dict.fromkeys(record["line"] for record in records):
        _plot(axes, [record for record in records if record["line"] == line], "forward_backward", line)
    of_first = [record for record in records if record["line"] == records[0]["line"]]
    looks = [("limit", "limit: raw exchanges and dense products", "0.45"), ("naive", "naive way", "tab:red")]
    if with_bytes:
        looks.append(("rows", "the same with an exchange of rows", "tab:orange"))
    for contestant, label, color in looks:
        if all(contestant in record["spread_ms"] for record in of_first):
            _plot(axes, of_first, contestant, label, color)
    for panel in (axes, *beside):
        if sweep != "skew":
            panel.set_xscale("log", base=2)
            panel.set_xticks(SWEEPS[sweep], [f"{value:g}" for value in SWEEPS[sweep]])
        panel.set(xlabel=_LABELS[sweep])
        panel.grid(alpha=0.3)
    if sweep == "tokens":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set(ylabel="ms, forward + backward", title=title)
    axes.legend()
    for panel in beside:
        _plot_bytes(panel, of_first)
    figure.savefig(path, dpi=120)


def _plot_bytes(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Bytes on the wire, of the layer and of the same with an exchange of rows."""
    values = [record["value"] for record in records]
    for key, label, color in (
        ("wire_bytes", "layer", "tab:blue"),
        ("wire_bytes_of_rows", "the same with an exchange of rows", "tab:orange"),
    ):
        axes.plot(values, [record[key] / 1e6 for record in records], marker="o", label=label, color=color)
    axes.set(ylabel="MB on the wire, all ranks together", title="what travels", ylim=(0, None))
    axes.legend()


def _plot(
    axes: Any, records: Sequence[Mapping[str, Any]], contestant: str, label: str, color: str | None = None
) -> None:
    """A line through the medians, and the middle half of the repetitions as a band."""
    values = [record["value"] for record in records]
    medians = [record[f"{contestant}_ms"] for record in records]
    low, high = zip(*(record["spread_ms"][contestant] for record in records), strict=True)
    (line,) = axes.plot(values, medians, marker="o", label=label, color=color)
    axes.fill_between(values, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
