# SPDX-License-Identifier: Apache-2.0
"""One seed gives one sequence of losses, however many ranks there are and however experts are spread."""

import numpy as np
import pytest

from hyperep.loopback import run
from hyperep.train.loop import main
from hyperep.train.metrics import read_metrics
from hyperep.train.settings import Settings

SMALL = {"steps": 4, "dim": 16, "experts": 4, "heads": 2, "seq_len": 16, "batch_tokens": 128, "warmup_steps": 1}


@pytest.fixture
def text(tmp_path):
    """A text of its own, so that the test does not read the standard library on every rank."""
    words = np.random.default_rng(0).choice(["def ", "return ", "x", "y", " + ", "\n", "(", ")"], size=4000)
    path = tmp_path / "text.txt"
    path.write_text("".join(words))
    return str(path)


def losses(tmp_path, text, ranks, **changes):
    out = tmp_path / f"out-{ranks}-{len(list(tmp_path.iterdir()))}"
    settings = Settings(**{**SMALL, "text": text, "out": str(out), **changes})
    summary = run(lambda platform: main(platform, settings.as_dict()), ranks)[0]
    return [record["loss"] for record in read_metrics(out, last_step=settings.steps)], summary


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (4, {}),
        (2, {"style": "tp", "tp": 2}),
        (4, {"style": "tp", "tp": 2}),
        (4, {"style": "etp", "tp": 2}),
    ],
)
def test_losses_do_not_depend_on_the_ranks(tmp_path, text, ranks, changes):
    expected, _ = losses(tmp_path, text, 1)
    found, summary = losses(tmp_path, text, ranks, verify=True, **changes)
    # Four steps at the full rate: a gradient that is off by a factor, or clipped otherwise, shows from the second on.
    assert expected[-1] < expected[0] - 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert summary["verified"] is True
    assert summary["largest_deviation"] < 1e-5
