# SPDX-License-Identifier: Apache-2.0
"""The default ``sum_rows`` against a loop."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform

TOKENS, TERMS, DIM = 5, 3, 4


def case(dtype=np.float64):
    rng = np.random.default_rng(4)
    x, g = rng.normal(size=(TOKENS * TERMS, DIM)).astype(dtype), rng.normal(size=(TOKENS, DIM)).astype(dtype)
    index = rng.permutation(TOKENS * TERMS)
    return x, index.reshape(TOKENS, TERMS), np.argsort(index), rng.normal(size=(TOKENS, TERMS)).astype(dtype), g


@pytest.mark.parametrize("weighted", [True, False])
def test_sums_and_gradients(weighted):
    platform = LoopbackPlatform()
    x, index, inverse, weights, g = case()
    w = weights if weighted else np.ones_like(weights)
    primals = (x, weights) if weighted else (x,)
    out, pullback = platform.vjp(lambda x, *w: platform.sum_rows(x, index, inverse, *w), *primals)
    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    for t in range(TOKENS):
        np.testing.assert_allclose(out[t], sum(w[t, k] * x[index[t, k]] for k in range(TERMS)), rtol=1e-12)
        for k in range(TERMS):
            grad_x[index[t, k]] = w[t, k] * g[t]
            grad_w[t, k] = g[t] @ x[index[t, k]]
    for got, want in zip(pullback(g), (grad_x, grad_w), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_dtype_is_that_of_the_rows():
    platform = LoopbackPlatform()
    x, index, inverse, weights, _ = case(np.float32)
    assert platform.sum_rows(x, index, inverse, weights).dtype == np.float32
    assert platform.sum_rows(x, index, inverse).dtype == np.float32


def test_no_rows():
    platform = LoopbackPlatform()
    x, index, inverse = np.zeros((0, DIM)), np.zeros((0, TERMS), dtype=np.int64), np.zeros(0, dtype=np.int64)
    weights = np.zeros((0, TERMS))
    out, pullback = platform.vjp(lambda x, w: platform.sum_rows(x, index, inverse, w), x, weights)
    assert out.shape == (0, DIM)
    assert [t.shape for t in pullback(out)] == [(0, DIM), (0, TERMS)]


@pytest.mark.parametrize("weighted", [True, False])
def test_terms_without_a_row_add_nothing_whatever_their_weight(weighted):
    platform = LoopbackPlatform()
    rng = np.random.default_rng(6)
    x, g = rng.normal(size=(4, DIM)), rng.normal(size=(TOKENS, DIM))
    index = np.array([[1, 4, 9], [4, 4, 4], [0, 3, 7], [4, 2, 4], [5, 5, 5]])  # 4 and more are no rows
    inverse = np.array([6, 0, 10, 7])
    weights = rng.normal(size=(TOKENS, TERMS))
    weights[index >= 4] = np.nan
    primals = (x, weights) if weighted else (x,)
    out, pullback = platform.vjp(lambda x, *w: platform.sum_rows(x, index, inverse, *w), *primals)
    w = weights if weighted else np.ones_like(weights)
    wanted, grad_x, grad_w = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for row, entry in enumerate(inverse):
        t, k = divmod(entry, TERMS)
        wanted[t] += w[t, k] * x[row]
        grad_x[row], grad_w[t, k] = w[t, k] * g[t], g[t] @ x[row]
    np.testing.assert_allclose(out, wanted, rtol=1e-12)
    for got, want in zip(pullback(g), (grad_x, grad_w), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_tokens_of_which_no_term_has_a_row():
    platform = LoopbackPlatform()
    nobody, weights = np.full((TOKENS, TERMS), 3), np.ones((TOKENS, TERMS))
    no_rows, no_inverse = np.zeros((0, DIM)), np.zeros(0, dtype=np.int64)
    out, pullback = platform.vjp(lambda x, w: platform.sum_rows(x, nobody, no_inverse, w), no_rows, weights)
    np.testing.assert_array_equal(out, np.zeros((TOKENS, DIM)))
    grad_x, grad_w = pullback(np.ones((TOKENS, DIM)))
    assert grad_x.shape == (0, DIM)
    np.testing.assert_array_equal(grad_w, np.zeros((TOKENS, TERMS)))
