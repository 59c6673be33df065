# SPDX-License-Identifier: Apache-2.0
"""The picture of a timeline: for each rank, what is on the wire and when it computes, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperep.bench.timeline import Span, computing
from hyperep.drawing import import_matplotlib

__all__ = ["draw_timeline", "lanes"]

_FORWARD, _BACKWARD, _COMPUTING = "tab:blue", "tab:purple", "tab:green"


def lanes(spans: Sequence[Span]) -> list[int]:
    """In which row of the wire each span is drawn, so that none covers another."""
    free: list[float] = []
    found = []
    for span in spans:
        row = next((i for i, until in enumerate(free) if until <= span.issued), len(free))
        free[row : row + 1] = [span.arrived]
        found.append(row)
    return found


def draw_timeline(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the timelines of *records* of ``hyperep bench``, one below the other, on one scale of time."""
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [(f"{record['shape']}, {of['title']}", of["ranks"]) for record in records for of in record["timelines"]]
    rows = sum(len(ranks) for _, ranks in shown)
    figure = Figure(figsize=(11, 1.0 + 0.75 * rows + 0.5 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, ranks) in zip(panels, shown, strict=True):
        _draw_one(axes, title, ranks)
    panels[-1].set_xlabel("ms")
    looks = ((_FORWARD, "on the wire, forward"), (_BACKWARD, "on the wire, backward"), (_COMPUTING, "computing"))
    figure.legend(handles=[Patch(color=c, label=text) for c, text in looks], loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=120)


def _draw_one(axes: Any, title: str, ranks: Sequence[Mapping[str, Any]]) -> None:
    labels: list[tuple[float, str]] = []
    for of in ranks:
        middle, end = of["forward_ms"], of["end_ms"]
        spans = [
            Span(e["issued_ms"], e["waited_ms"], e["arrived_ms"], e["bytes"])
            for e in sorted(of["exchanges"], key=lambda e: e["issued_ms"])
        ]
        top = -3.0 * of["rank"]
        rows = lanes(spans)
        height = 0.9 / (max(rows, default=0) + 1)
        for span, row in zip(spans, rows, strict=True):
            color = _FORWARD if span.issued < middle else _BACKWARD
            box = {"height": 0.85 * height, "align": "edge", "color": color, "linewidth": 0}
            axes.barh(top - (row + 1) * height, span.arrived - span.issued, left=span.issued, alpha=0.75, **box)
        for begin, stop in computing(spans, end):
            axes.barh(top - 1.9, stop - begin, left=begin, height=0.8, align="edge", color=_COMPUTING, linewidth=0)
        axes.plot([middle, middle], [top, top - 2], color="black", linewidth=0.8)
        labels += [(top - 0.5, f"rank {of['rank']}: wire"), (top - 1.5, "arithmetic")]
    axes.set_yticks([y for y, _ in labels], [text for _, text in labels])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{title}: {max(of['end_ms'] for of in ranks):.0f} ms", loc="left", fontsize=10)
