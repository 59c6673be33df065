# SPDX-License-Identifier: Apache-2.0
"""What styles do to parameters and buffers, on one rank and on two; the suite does not ask for all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hyperep_jax.launcher import launcher

from hyperep.launch import run_on_ranks

NEUTRAL = str(Path(__file__).parents[3] / "tests" / "neutral")


@pytest.fixture(autouse=True)
def _cases_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NEUTRAL)  # ranks get this process's path


CASES: dict[str, dict[str, Any]] = {
    "ties_are_kept": {},
    "ties_that_cannot_be_kept_are_refused": {},
    "attributes_of_parameters_are_kept": {},
    "buffers_of_experts_are_split": {"style": "ep"},
    "a_style_on_a_layer_of_seeds": {"seeds": "one for all"},
}


# What is compiled is compiled once on each rank, which takes minutes on a small machine.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_styles_split(case: str, ranks: int) -> None:
    assert sys.path[0] == NEUTRAL
    run_on_ranks(launcher, "jax", f"style_cases:{case}", CASES[case], ranks, deadline=250)
