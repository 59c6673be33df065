# SPDX-License-Identifier: Apache-2.0
"""AdamW by hand, and what it must not do with rounding noise."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.train import optimizer
from hyperep.train.gradients import clip_scale


def trained(gradients, *, rate=0.1, decay=0.5, start=2.0, shape=(1, 1)):
    platform = LoopbackPlatform()
    module = platform.make_module("One", {"w": np.full(shape, start, np.float32)}, lambda m: m.w)
    parameters = platform.parameters(module)
    moments = optimizer.start(platform, parameters)
    for step, gradient in enumerate(gradients, 1):
        moments = optimizer.update(
            platform,
            parameters,
            {"w": np.full(shape, gradient, np.float32)},
            moments,
            step=step,
            rate=rate,
            weight_decay=decay,
        )
    return float(platform.local(parameters["w"]).flat[0])


def test_two_steps_by_hand():
    # First step: both means are the gradient's, so the move is the rate. Decay takes 5 % of the value before it.
    first = 2.0 * 0.95 - 0.1
    assert trained([1.0]) == pytest.approx(first, abs=1e-5)
    mean = (0.9 * 0.1 * 1.0 + 0.1 * 3.0) / (1 - 0.9**2)
    square = (0.95 * 0.05 * 1.0 + 0.05 * 9.0) / (1 - 0.95**2)
    assert trained([1.0, 3.0]) == pytest.approx(first * 0.95 - 0.1 * mean / square**0.5, abs=1e-5)


def test_scales_do_not_decay():
    assert trained([0.0], shape=(3,)) == 2.0
    assert trained([0.0], shape=(3, 1)) == pytest.approx(1.9)


def test_noise_does_not_move_a_weight_at_the_full_rate():
    assert abs(trained([1e-9], decay=0.0) - 2.0) < 0.1 * 1e-3


def test_the_rate_warms_up():
    rates = [optimizer.learning_rate(step, lr=0.5, warmup_steps=4) for step in (1, 2, 4, 9)]
    assert rates == [0.125, 0.25, 0.5, 0.5]
    assert optimizer.learning_rate(1, lr=0.5, warmup_steps=0) == 0.5


@pytest.mark.parametrize(("norm", "scale"), [(4.0, 0.5), (2.0, 1.0), (0.1, 1.0), (0.0, 1.0)])
def test_clipping_scales_down_and_never_up(norm, scale):
    assert clip_scale(LoopbackPlatform(), np.float32(norm), 2.0) == pytest.approx(scale)
