# SPDX-License-Identifier: Apache-2.0
"""The default ``grouped_swiglu`` against the same formula, one group at a time, on a plain tape."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.platform.swiglu import swiglu

DIM, HIDDEN = 5, 7


def arguments(sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(sum(sizes), DIM), (len(sizes), HIDDEN, DIM), (len(sizes), DIM, HIDDEN), (len(sizes), HIDDEN, DIM)]
    return [rng.normal(size=shape) for shape in shapes], rng.normal(size=(sum(sizes), DIM))


def one_group_at_a_time(xp, sizes, x, w1, w2, w3):
    parts, start = [], 0
    for group, size in enumerate(sizes):
        rows = x[start : start + size]
        gate = rows @ xp.permute_dims(w1[group], (1, 0))
        hidden = gate / (1.0 + xp.exp(-gate)) * (rows @ xp.permute_dims(w3[group], (1, 0)))
        parts.append(hidden @ xp.permute_dims(w2[group], (1, 0)))
        start += size
    return xp.concat(parts, axis=0)


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 6), (2, 2, 2)], ids=str)
def test_output_and_all_four_gradients(sizes):
    platform = LoopbackPlatform()
    tensors, cotangent = arguments(sizes)
    out, pullback = platform.vjp(lambda *t: platform.grouped_swiglu(*t, np.array(sizes)), *tensors)
    expected, expected_pullback = platform.vjp(lambda *t: one_group_at_a_time(platform.xp, sizes, *t), *tensors)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        assert np.abs(got - want).max() <= 1e-10 * np.abs(want).max()


def test_no_rows_give_zero_gradients_of_full_shape():
    platform = LoopbackPlatform()
    tensors, cotangent = arguments((0, 0))
    out, pullback = platform.vjp(lambda *t: platform.grouped_swiglu(*t, np.array([0, 0])), *tensors)
    assert out.shape == (0, DIM)
    for got, tensor in zip(pullback(cotangent), tensors, strict=True):
        assert got.shape == tensor.shape
        assert not got.any()


def test_large_projections_overflow_nowhere():
    platform = LoopbackPlatform()
    gate = np.array([[-1e4, -50.0, 0.0, 50.0, 1e4]], dtype=np.float32)
    with np.errstate(all="raise"):
        out, pullback = platform.vjp(lambda g, u: swiglu(platform, g, u), gate, np.ones_like(gate))
        grad_gate, grad_up = pullback(np.ones_like(gate))
    np.testing.assert_allclose(out, [[0, 0, 0, 50, 1e4]], atol=1e-6)
    np.testing.assert_allclose(grad_gate, [[0, 0, 0.5, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(grad_up, out)
