# SPDX-License-Identifier: Apache-2.0
"""Gradients on loopback have the dtype of what they are the gradient of, whatever autograd's own rules would make."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform

P = LoopbackPlatform()
XP = P.xp

FUNCTIONS = {
    "abs": XP.abs,
    "cumulative_sum": lambda a: XP.cumulative_sum(a, axis=1),
    "divide": lambda a: a / XP.sum(a, axis=1, keepdims=True),
    "exp": XP.exp,
    "log": lambda a: XP.log(a * a + 1),
    "max": lambda a: XP.max(a, axis=1),
    "maximum": lambda a: XP.maximum(a, 0.0),
    "mean": lambda a: XP.mean(a, axis=1),
    "min": lambda a: XP.min(a, axis=1),
    "minimum": lambda a: XP.minimum(a, 0.5),
    "power": lambda a: a**2,
    "sqrt": lambda a: XP.sqrt(a * a + 1),
    "take": lambda a: XP.take(a, P.arange(3), axis=0),
    "tanh": XP.tanh,
    "where": lambda a: XP.where(a > 0, a, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_keep_their_dtype(name):
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    out, pullback = P.vjp(FUNCTIONS[name], x)
    assert out.dtype == np.float32
    assert pullback(np.ones_like(out))[0].dtype == np.float32
