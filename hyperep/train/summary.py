# SPDX-License-Identifier: Apache-2.0
"""The final figures of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hyperep.train.metrics import imbalance, rank_imbalance
from hyperep.train.settings import Settings
from hyperep.train.verify import Verdict

__all__ = ["summarize"]


def summarize(settings: Settings, records: Sequence[dict[str, Any]], verdict: Verdict | None) -> dict[str, Any]:
    """Plain data about a finished run.

    Returns:
        ``steps``, how many were taken in all; ``first_loss`` and ``last_loss``; ``tokens_per_s``, the median over the
        steps; ``seconds``, their sum; ``load_imbalance`` and ``rank_imbalance``, their means over the last tenth of the
        steps; ``verified`` and ``largest_deviation`` of a loss, which are ``None`` if nobody asked; and ``lines``,
        which say it to people.
    """
    first, last = records[0], records[-1]
    tail = records[-max(1, len(records) // 10) :]
    by_rank = [value for record in tail if (value := rank_imbalance(record)) is not None]
    figures: dict[str, Any] = {
        "steps": last["step"],
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in records),
        "seconds": sum(settings.batch_tokens / record["tokens_per_s"] for record in records),
        "load_imbalance": statistics.fmean(imbalance(record) for record in tail),
        "rank_imbalance": statistics.fmean(by_rank) if by_rank else 1.0,
        "verified": verdict and verdict.passed,
        "largest_deviation": verdict and verdict.loss.value,
    }
    lines = [
        f"loss {figures['first_loss']:.4f} -> {figures['last_loss']:.4f} in {figures['steps']} steps, "
        f"{figures['tokens_per_s']:,.0f} tokens/s, load max/mean {figures['load_imbalance']:.2f} by expert and "
        f"{figures['rank_imbalance']:.2f} by rank",
        *([] if verdict is None else [verdict.describe()]),
        f"report: {settings.out}/report.html",
    ]
    return {**figures, "lines": lines}
