# SPDX-License-Identifier: Apache-2.0
"""What a step's load was, layer by layer."""

from __future__ import annotations

from hyperep.exchange.load import LoadFigures, load_figures
from hyperep.train.parallel import expert_balance
from hyperep.train.settings import Settings
from hyperep.train.trainer import StepResult

__all__ = ["load_by_layer"]


def load_by_layer(settings: Settings, result: StepResult) -> list[LoadFigures]:
    """The figures of each layer; ranks are those of the data dimension.

    Where experts are balanced, the plan that the layer made is made again from the same counts: it is a pure function.
    """
    balance = expert_balance(settings)
    if balance is None:
        return [load_figures(counts, spread=settings.style != "tp") for counts in result.load]
    return [load_figures(counts, balance.plan(counts, 0)) for counts in result.load]
