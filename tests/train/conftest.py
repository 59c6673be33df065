# SPDX-License-Identifier: Apache-2.0
"""A small run: settings, a text of its own, and a function that trains on loopback."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperep.loopback import run
from hyperep.train import loop
from hyperep.train.metrics import read_metrics
from hyperep.train.settings import Settings

SMALL = {
    "steps": 4,
    "dim": 16,
    "experts": 4,
    "heads": 2,
    "seq_len": 16,
    "batch_tokens": 128,
    "warmup_steps": 1,
    "lr": 1e-2,
}


@pytest.fixture
def text(tmp_path):
    """A text that is read faster than the standard library."""
    words = np.random.default_rng(0).choice(["def ", "return ", "x", "y", " + ", "\n", "(", ")"], size=4000)
    path = tmp_path / "text.txt"
    path.write_text("".join(words))
    return str(path)


@pytest.fixture
def small(text, tmp_path):
    """Settings of a small run, with changes, in a directory of its own."""
    numbers = itertools.count()

    def settings(**changes: Any) -> Settings:
        return Settings(**{**SMALL, "text": text, "out": str(tmp_path / f"out{next(numbers)}"), **changes})

    return settings


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out what takes most of the time of a small run: its pictures and its report."""
    monkeypatch.setattr(loop, "write_outputs", lambda *arguments, **keywords: None)


@pytest.fixture
def train():
    """Train on loopback; return rank 0's summary and the records of every step."""

    def train_on(ranks: int, settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        summary = run(lambda platform: loop.main(platform, settings.as_dict()), ranks)[0]
        return summary, read_metrics(Path(settings.out), last_step=settings.steps)

    return train_on
