# SPDX-License-Identifier: Apache-2.0
"""What a step's load was, layer by layer."""

from __future__ import annotations

from hyperep.exchange.load import LoadFigures, load_figures
from hyperep.train.settings import Settings
from hyperep.train.trainer import StepResult

__all__ = ["load_by_layer"]


def load_by_layer(settings: Settings, result: StepResult) -> list[LoadFigures]:
    """The figures of each layer; ranks are those of the data dimension."""
    return [load_figures(counts, spread=settings.style != "tp") for counts in result.load]
