# SPDX-License-Identifier: Apache-2.0
"""Grouped products and the feed-forward of experts against a NumPy loop, with groups that have no rows."""

import numpy as np
import pytest

SIZES = [[3, 2, 4], [0, 5, 0], [9, 0, 0], [0, 0, 0], [2, 0, 1]]


def _data(sizes, *shapes):
    rng = np.random.default_rng(sum(sizes))
    return [rng.normal(size=s) for s in shapes]


def _runs(sizes):
    stops = np.cumsum(sizes)
    return [(e, stop - n, stop) for e, (n, stop) in enumerate(zip(sizes, stops, strict=True))]


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul(platform, sizes, dtype):
    n = sum(sizes)
    x, w, g = _data(sizes, (n, 4), (3, 5, 4), (n, 5))
    counts = platform.from_host(np.array(sizes, np.int64))
    give = lambda a: platform.from_host(a.astype(dtype))  # noqa: E731
    out, pullback = platform.vjp(lambda x, w: platform.grouped_matmul(x, w, counts), give(x), give(w))
    grad_x, grad_w = pullback(give(g))
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 3e-2}[dtype]
    for result, expected in (
        (out, [x[a:b] @ w[e].T for e, a, b in _runs(sizes)]),
        (grad_x, [g[a:b] @ w[e] for e, a, b in _runs(sizes)]),
    ):
        np.testing.assert_allclose(result.asnumpy(), np.concatenate(expected), rtol=tolerance, atol=tolerance)
    expected = np.stack([g[a:b].T @ x[a:b] for _, a, b in _runs(sizes)])
    np.testing.assert_allclose(grad_w.asnumpy(), expected, rtol=tolerance, atol=tolerance)
    assert str(out.dtype).lower() == dtype


@pytest.mark.usefixtures("stale_memory")
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_swiglu_is_three_products(platform, sizes):
    n = sum(sizes)
    x, w1, w2, w3, g = _data(sizes, (n, 4), (3, 5, 4), (3, 4, 5), (3, 5, 4), (n, 4))
    counts = platform.from_host(np.array(sizes, np.int32))
    given = [platform.from_host(a) for a in (x, w1, w2, w3)]
    out, pullback = platform.vjp(lambda *inputs: platform.grouped_swiglu(*inputs, counts), *given)
    composed, other = platform.vjp(
        lambda *inputs: super(type(platform), platform).grouped_swiglu(*inputs, counts), *given
    )
    cotangent = platform.from_host(g)
    theirs = [composed, *other(cotangent)]
    for ours, expected in zip([out, *pullback(cotangent)], theirs, strict=True):
        np.testing.assert_allclose(ours.asnumpy(), expected.asnumpy(), rtol=1e-10, atol=1e-12)
    gate = [x[a:b] @ w1[e].T for e, a, b in _runs(sizes)]
    rows = [
        (z / (1 + np.exp(-z)) * (x[a:b] @ w3[e].T)) @ w2[e].T for z, (e, a, b) in zip(gate, _runs(sizes), strict=True)
    ]
    np.testing.assert_allclose(out.asnumpy(), np.concatenate(rows), rtol=1e-10, atol=1e-12)


def test_sizes_that_do_not_sum_to_the_rows(platform):
    counts = platform.from_host(np.array([1, 1], np.int64))
    with pytest.raises(ValueError, match=r"group_sizes=\[1, 1\] sum to \[2\], but there are 3 rows"):
        platform.grouped_matmul(platform.xp.ones((3, 2)), platform.xp.ones((2, 4, 2)), counts)
