# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run: its loss, and how the load of the experts went.

Figures are made as objects, without pyplot: that keeps global state, and rank 0 may be a thread.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hyperep.train.settings import VOCABULARY
from hyperep.train.themes import LIGHT, Theme

__all__ = ["expert_load_picture", "loss_picture", "rank_load_picture"]

_DPI = 150
_SMOOTHED_FROM = 40
"""Steps from which on the loss is shown smoothed as well."""


def loss_picture(records: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """The loss over the steps, as PNG; with that of the unsharded model, where it was trained beside."""
    figure, (axes,) = _figure(theme, panels=1, height=4.2)
    steps = [record["step"] for record in records]
    losses = np.array([record["loss"] for record in records])
    smooth = len(losses) >= _SMOOTHED_FROM
    axes.plot(
        steps,
        losses,
        color=theme.line,
        linewidth=1.1 if smooth else 2.0,
        alpha=0.45 if smooth else 1.0,
        marker="o" if len(losses) == 1 else None,
        label="loss of each step",
    )
    if smooth:
        axes.plot(steps, _smoothed(losses), color=theme.line, linewidth=2.2, label="smoothed")
    verified = [(record["step"], record["reference_loss"]) for record in records if record.get("reference_loss")]
    if verified:
        axes.plot(
            *zip(*verified, strict=True),
            color=theme.accent,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label="unsharded model",
        )
    uniform = math.log(VOCABULARY)
    axes.axhline(
        uniform, color=theme.faint, linewidth=1, linestyle=":", label=f"uniform guess, ln {VOCABULARY} = {uniform:.2f}"
    )
    axes.annotate(
        f"{losses[-1]:.3f}",
        (steps[-1], losses[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=theme.ink,
        va="center",
    )
    axes.set(xlabel="step", ylabel="cross entropy (nats per byte)")
    _title(axes, "Training loss", theme)
    axes.set_xlim(steps[0] - 0.5, steps[-1] + max(0.5, 0.07 * (steps[-1] - steps[0])))
    axes.grid(axis="y", color=theme.faint, alpha=0.25, linewidth=0.8)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return _png(figure)


def expert_load_picture(records: Sequence[dict[str, Any]], *, owners: int = 1, theme: Theme = LIGHT) -> bytes:
    """The load of every expert over the steps, a row for each expert and a panel for each layer, as PNG.

    Args:
        records: of the run.
        owners: ranks that the experts are split over; lines part what they own.
        theme: colours.
    """
    load = np.array([record["layer_load"] for record in records], dtype=np.float64)  # [steps, layers, E]
    return _heat_map([record["step"] for record in records], load, "expert", owners, theme)


def rank_load_picture(records: Sequence[dict[str, Any]], *, theme: Theme = LIGHT) -> bytes | None:
    """The rows that every rank computed over the steps, in the same way; ``None`` where there never was but one rank.

    The run may have been resumed with another number of ranks: where a step had fewer, the others are left blank.
    """
    known = [record for record in records if record.get("load")]
    rows = [[layer["rank_rows"] for layer in record["load"]] for record in known]
    ranks = max((len(layer) for step in rows for layer in step), default=1)
    if ranks == 1:
        return None
    load = np.array([[layer + [np.nan] * (ranks - len(layer)) for layer in step] for step in rows], dtype=np.float64)
    return _heat_map([record["step"] for record in known], load, "rank", 1, theme)


def _heat_map(steps: Sequence[int], load: np.ndarray, what: str, owners: int, theme: Theme) -> bytes:
    """*load* ``[steps, layers, rows]`` relative to an even share, a panel for each layer."""
    relative = load / np.nanmean(load, axis=2, keepdims=True)
    _, layers, rows = load.shape
    figure, panels = _figure(theme, panels=layers, height=max(2.0, min(6.0, 0.24 * rows + 0.7)) * layers + 0.5)
    edges = _edges(steps)
    # Ranks are nearer to one another than experts are: there the colours go as far as the load does.
    low, high = (0.0, 2.0) if what == "expert" else (min(0.9, float(np.nanmin(relative))), 1.1)
    for layer, axes in enumerate(panels):
        image = axes.pcolormesh(
            edges,
            np.arange(rows + 1),
            np.ma.masked_invalid(relative[:, layer].T),
            cmap="viridis",
            vmin=low,
            vmax=max(high, float(np.nanmax(relative))),
        )
        axes.invert_yaxis()
        if rows <= 32:
            axes.set_yticks(np.arange(rows) + 0.5, [str(e) for e in range(rows)])
        axes.set_ylabel(what)
        _title(axes, f"{what.capitalize()} load, layer {layer}", theme)
        axes.tick_params(length=0)
        for rank in range(owners):
            first = rank * rows // owners
            if rank:
                axes.axhline(first, color=theme.page, linewidth=2.5)
            if owners > 1:
                _name_owner(axes, rank, first + rows / owners / 2, theme)
    panels[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=panels, pad=0.06 if owners > 1 else 0.02, aspect=16 * layers, fraction=0.06)
    bar.set_label("rows, relative to an even share", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink, length=0)
    bar.outline.set_visible(False)
    return _png(figure)


def _title(axes: Axes, title: str, theme: Theme) -> None:
    axes.set_title(title, loc="left", color=theme.ink, fontweight="bold", fontsize=11)


def _name_owner(axes: Axes, rank: int, row: float, theme: Theme) -> None:
    axes.annotate(
        f"rank {rank}",
        (1.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=theme.faint,
    )


def _figure(theme: Theme, *, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, height), dpi=_DPI, facecolor=theme.page, layout="constrained")
    grid = figure.subplots(panels, 1, squeeze=False, sharex=True)
    for axes in grid[:, 0]:
        axes.set_facecolor(theme.page)
        axes.tick_params(colors=theme.ink)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(theme.ink)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
    return figure, list(grid[:, 0])


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Where the columns of a heat map begin and end."""
    return np.array([*(step - 0.5 for step in steps), steps[-1] + 0.5])


def _smoothed(values: np.ndarray, span: int = 9) -> np.ndarray:
    """A centred running mean; near the ends over what is there."""
    kernel = np.ones(span)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
