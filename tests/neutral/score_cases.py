# SPDX-License-Identifier: Apache-2.0
"""Scores of ordinary and of extreme logits. Runs on every platform."""

import numpy as np
from measure import relative, rows

from hyperep.moe.scores import logsumexp, sigmoid, softmax

EXTREME = np.array(
    [[0.0, 1.0, -1.0], [200.0, -200.0, 0.0], [-1e4, -1e4, -1e4], [-95.0, -95.0, -94.0], [88.0, 89.0, 90.0]], np.float32
)


def _exact(name, z):
    z = z.astype(np.float64)
    if name == "sigmoid":
        return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
    highest = z.max(axis=-1, keepdims=True)
    total = np.exp(z - highest).sum(axis=-1, keepdims=True)
    return np.exp(z - highest) / total if name == "softmax" else (np.log(total) + highest)[:, 0]


def _exact_gradient(name, z, g):
    y = _exact("sigmoid" if name == "sigmoid" else "softmax", z)
    if name == "sigmoid":
        return g * y * (1 - y)
    return g[:, None] * y if name == "logsumexp" else y * (g - (g * y).sum(axis=-1, keepdims=True))


def scores_agree(platform, name):
    """Values and gradients, also where ``exp`` would overflow, and at zero, where two branches meet."""
    function = {"softmax": softmax, "sigmoid": sigmoid, "logsumexp": logsumexp}[name]
    for z in (EXTREME, 3 * rows(1, 4, 3)):
        cotangent = rows(2, len(z)) if name == "logsumexp" else rows(2, *z.shape)
        out, pullback = platform.vjp(lambda x: function(platform, x), platform.from_host(z))
        value, gradient = platform.to_host(out, *pullback(platform.from_host(cotangent)))
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        assert relative(value, _exact(name, z)) < 1e-6
        assert relative(gradient, _exact_gradient(name, z, cotangent)) < 1e-6


def small_sigmoids_keep_their_digits(platform):
    """Far below zero a sigmoid is tiny, and still right to the last bits: normalised scores depend on its digits."""
    z = np.linspace(-60, -5, 12, dtype=np.float32)
    value = platform.to_host(sigmoid(platform, platform.from_host(z)))[0]
    assert np.abs(value / _exact("sigmoid", z) - 1).max() < 1e-6
