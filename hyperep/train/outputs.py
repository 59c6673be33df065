# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves for people: its pictures and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperep.drawing import import_matplotlib
from hyperep.train.claim import PAGE, PICTURES
from hyperep.train.report import Picture, report_page
from hyperep.train.settings import Settings
from hyperep.train.text import Text
from hyperep.train.themes import DARK, LIGHT
from hyperep.train.verify import Verdict

__all__ = ["write_outputs"]

_STYLE_NAMES = {"ep": "expert parallelism", "tp": "tensor parallelism", "etp": "expert and tensor parallelism"}


def write_outputs(
    out: Path,
    *,
    settings: Settings,
    text: Text,
    records: Sequence[dict[str, Any]],
    summary: Mapping[str, Any],
    verdict: Verdict | None,
    dtype: str,
    parameters: int,
    environment: Mapping[str, str],
) -> str | None:
    """Write the pictures and ``report.html`` to *out*; on one rank only.

    Returns:
        Why there are no pictures, if they could not be drawn: a run that is done does not fail for that.
    """
    ranks = int(environment["Ranks"])
    remark = None
    pictures: list[tuple[str, str, Picture]] = []
    try:
        pictures = _draw(out, records, owners=1 if settings.style == "tp" else ranks // settings.tp)
    except Exception as error:
        remark = f"pictures were not drawn: {type(error).__name__}: {' '.join(str(error).split())}"
    bits = summary["last_loss"] / math.log(2)
    page = report_page(
        title="hyperep training run",
        headline=(
            f"A byte-level language model of {parameters:,} parameters, {settings.layers} layers of {settings.experts} "
            f"experts with top-{settings.top_k} routing, trained with {_STYLE_NAMES[settings.style]} over {ranks} "
            f"{'rank' if ranks == 1 else 'ranks'} of the platform {environment['Platform']}."
        ),
        figures=[
            (
                "Final loss",
                f"{summary['last_loss']:.4f}",
                f"from {summary['first_loss']:.4f}; {bits:.2f} bits per byte",
            ),
            ("Throughput", f"{summary['tokens_per_s']:,.0f}", "tokens per second, median of the steps"),
            (
                "Load imbalance",
                f"{summary['load_imbalance']:.2f}",
                f"max / mean of the worst layer, last tenth; by rank {summary['rank_imbalance']:.2f}; 1 is even",
            ),
            ("Steps", f"{summary['steps']:,}", f"{summary['steps'] * settings.batch_tokens:,} tokens"),
        ],
        verdict=None if verdict is None else (verdict.passed, _sentence(verdict.describe())),
        pictures=pictures,
        tables=[
            ("Final figures", _final_figures(records[-1], summary, verdict)),
            ("Environment", environment),
            ("Settings", _settings(settings, text) | {"dtype": dtype}),
        ],
    )
    (out / PAGE).write_text(page, encoding="utf-8")
    return remark


def _draw(out: Path, records: Sequence[dict[str, Any]], *, owners: int) -> list[tuple[str, str, Picture]]:
    """Write the pictures, and return them with their headings and captions."""
    import_matplotlib()
    from hyperep.train.pictures import expert_load_picture, loss_picture, rank_load_picture

    loss = {theme.name: loss_picture(records, theme) for theme in (LIGHT, DARK)}
    load = {theme.name: expert_load_picture(records, owners=owners, theme=theme) for theme in (LIGHT, DARK)}
    by_rank = {theme.name: rank_load_picture(records, theme=theme) for theme in (LIGHT, DARK)}
    ranks: Picture = {name: drawn for name, drawn in by_rank.items() if drawn is not None}
    for name, picture in zip(PICTURES, (loss, load, ranks), strict=True):
        if picture:
            (out / name).write_bytes(picture[LIGHT.name])
    found: list[tuple[str, str, Picture]] = [
        ("Training loss", "Mean cross entropy of each step's batch over all ranks, before the update.", loss),
        (
            "Expert load over the steps",
            "Rows that each expert got, over all ranks. An even share is 1; experts are named by their number, and "
            "lines part those of different ranks.",
            load,
        ),
        (
            "Load of ranks over the steps",
            "Rows that each rank computed. All ranks wait for the fullest one, so its distance from 1 is time lost.",
            ranks,
        ),
    ]
    return [of for of in found if of[2]]


def _final_figures(last: Mapping[str, Any], summary: Mapping[str, Any], verdict: Verdict | None) -> dict[str, str]:
    rows = {
        "Loss, first step": f"{summary['first_loss']:.6f}",
        "Loss, last step": f"{summary['last_loss']:.6f}",
        "Gradient norm, last step": f"{last['gradient_norm']:.4f}",
        "Tokens per second, median": f"{summary['tokens_per_s']:,.0f}",
        "Time of the steps": f"{summary['seconds']:,.1f} s",
    }
    for layer, load in enumerate(last["layer_load"]):
        rows[f"Rows per expert, layer {layer}"] = " ".join(str(n) for n in load)
    for layer, figures in enumerate(last.get("load", ())):
        rows[f"Load, layer {layer}"] = _load(figures)
    if verdict is not None:
        rows["Largest deviation of a loss"] = f"{verdict.loss.value:.2e} at step {verdict.loss.step}"
        rows["Largest deviation of the gradient's norm"] = f"{verdict.norm.value:.2e} at step {verdict.norm.step}"
        rows["Largest deviation of a change"] = f"{verdict.change.value:.2e} at step {verdict.change.step}"
    return rows


def _load(figures: Mapping[str, Any]) -> str:
    """The figures of a layer in words."""
    rows = sum(figures["rank_rows"])
    copied = f", {figures['copies']} copies took {figures['rows_saved']:,} from the fullest rank"
    return (
        f"max/mean {figures['expert_max_over_mean']:.2f} over experts and {figures['rank_max_over_mean']:.2f} over "
        f"ranks; variation {figures['expert_variation']:.2f}, entropy {figures['expert_entropy']:.3f}, dead "
        f"{figures['dead_experts']}; of {rows:,} rows {figures['rows_crossed']:,} crossed"
        f"{copied if figures['copies'] else ''}"
    )


def _settings(settings: Settings, text: Text) -> dict[str, str]:
    # Of a run's paths the page shows none: people pass it on, and a path tells whose machine it was.
    values = {**settings.as_dict(), "out": None, "overwrite": None, "resume": settings.resume and "yes"}
    shown = {name.replace("_", " "): str(value) for name, value in values.items() if value is not None}
    shown["text"] = f"{text.source}: {len(text.tokens):,} bytes of {text.files:,} files, SHA-256 {text.digest[:16]}"
    return shown


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."
