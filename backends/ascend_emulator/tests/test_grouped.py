# SPDX-License-Identifier: Apache-2.0
"""MindSpore's grouped products on Ascend: CANN's operator, what it refuses, and the adapter that calls it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hyperep_mindspore import grouped_operator
from hyperep_mindspore.private_names import grouped_product
from mindspore import Tensor, mint

SIZES = [[3, 2, 4], [0, 5, 0], [9, 0, 0], [0, 0, 0], [2, 0, 1], [6]]
TOLERANCES = {ms.float32: 1e-5, ms.float16: 2e-2, ms.bfloat16: 1e-1}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def _normal(sizes: list[int], *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(sizes))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _runs(sizes: list[int]) -> list[tuple[int, int, int]]:
    return [(e, int(stop - n), int(stop)) for e, (n, stop) in enumerate(zip(sizes, np.cumsum(sizes), strict=True))]


def _rounded(array: np.ndarray, dtype: ms.Type) -> tuple[Tensor, np.ndarray]:
    tensor = Tensor(array).astype(dtype)
    return tensor, tensor.astype(ms.float32).asnumpy().astype(np.float64)


def _close(found: Tensor, expected: np.ndarray, dtype: ms.Type) -> None:
    assert found.dtype == dtype
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found.astype(ms.float32).asnumpy(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.fixture
def unread(monkeypatch):
    """Fail where a tensor is copied to the host."""

    def read(self):
        raise AssertionError("copied to the host")

    def watch(on: bool) -> None:
        if on:
            monkeypatch.setattr(Tensor, "asnumpy", read)
        else:
            monkeypatch.undo()

    return watch


@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_grouped_product_and_its_gradients_without_a_copy_to_the_host(platform, unread, sizes, dtype) -> None:
    """Runs that are another group's, a weight gradient of NaN where a group has no rows, sizes read on the host."""
    groups, n = len(sizes), sum(sizes)
    (x, x64), (w, w64), (g, g64) = (_rounded(a, dtype) for a in _normal(sizes, (n, 4), (groups, 5, 4), (n, 5)))
    counts = Tensor(np.array(sizes, np.int32))
    unread(True)
    out, pullback = platform.vjp(lambda x, w: platform.grouped_matmul(x, w, counts), x, w)
    grad_x, grad_w = pullback(g)
    unread(False)
    runs = _runs(sizes)
    _close(out, np.concatenate([x64[a:b] @ w64[e].T for e, a, b in runs]), dtype)
    _close(grad_x, np.concatenate([g64[a:b] @ w64[e] for e, a, b in runs]), dtype)
    _close(grad_w, np.stack([g64[a:b].T @ x64[a:b] for e, a, b in runs]), dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_feed_forward_is_three_products_without_a_copy_to_the_host(platform, unread, sizes) -> None:
    """A gradient of one of the three weights that is another's, or read on the host."""
    groups, n = len(sizes), sum(sizes)
    x, w1, w2, w3, g = map(Tensor, _normal(sizes, (n, 4), (groups, 5, 4), (groups, 4, 5), (groups, 5, 4), (n, 4)))
    counts = Tensor(np.array(sizes, np.int64))
    unread(True)
    out, pullback = platform.vjp(lambda *inputs: platform.grouped_swiglu(*inputs, counts), x, w1, w2, w3)
    found = [out, *pullback(g)]
    unread(False)
    composed, other = platform.vjp(
        lambda *inputs: super(type(platform), platform).grouped_swiglu(*inputs, counts), x, w1, w2, w3
    )
    for ours, theirs in zip(found, [composed, *other(g)], strict=True):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-5, atol=1e-5)
    inputs = [a.asnumpy() for a in (x, w1, w2, w3)]
    z = np.concatenate([inputs[0][a:b] @ inputs[1][e].T for e, a, b in _runs(sizes)])
    up = np.concatenate([inputs[0][a:b] @ inputs[3][e].T for e, a, b in _runs(sizes)])
    hidden = z / (1 + np.exp(-z)) * up
    _close(out, np.concatenate([hidden[a:b] @ inputs[2][e].T for e, a, b in _runs(sizes)]), ms.float32)


@pytest.mark.parametrize("limit", ["_WIDTH_LIMIT", "_GROUP_LIMIT"])
def test_what_the_operator_excludes_goes_by_loops(platform, monkeypatch, limit) -> None:
    """A width or a number of groups past what CANN's page takes."""
    monkeypatch.setattr(grouped_operator, limit, 2)
    monkeypatch.setattr(grouped_operator, "grouped_product", None)
    x, w, g = _normal([3, 0, 2], (5, 4), (3, 5, 4), (5, 5))
    counts = Tensor(np.array([3, 0, 2]))
    out, pullback = platform.vjp(lambda x, w: platform.grouped_matmul(x, w, counts), Tensor(x), Tensor(w))
    grad_x, grad_w = pullback(Tensor(g))
    runs = _runs([3, 0, 2])
    _close(out, np.concatenate([x[a:b] @ w[e].T for e, a, b in runs]), ms.float32)
    _close(grad_x, np.concatenate([g[a:b] @ w[e] for e, a, b in runs]), ms.float32)
    _close(grad_w, np.stack([g[a:b].T @ x[a:b] for e, a, b in runs]), ms.float32)


def test_one_group_is_an_ordinary_product(platform, monkeypatch) -> None:
    """A list of one group, which some of CANN's documents forbid."""
    monkeypatch.setattr(grouped_operator, "grouped_product", None)
    x, w, g = _normal([4], (4, 3), (1, 5, 3), (4, 5))
    counts = Tensor(np.array([4]))
    out, pullback = platform.vjp(lambda x, w: platform.grouped_matmul(x, w, counts), Tensor(x), Tensor(w))
    for found, expected in zip([out, *pullback(Tensor(g))], [x @ w[0].T, g @ w[0], (g.T @ x)[None]], strict=True):
        _close(found, expected, ms.float32)


def _call(x: np.ndarray, weight: np.ndarray, group_type: int, **changes) -> Tensor:
    given = {"turned": group_type == 2, "weight_turned": False, "dtype": ms.float32, "list_dtype": ms.int64}
    given |= {"stops": [1, 4], "split_item": 3} | changes
    rows, factors = Tensor(x).astype(given["dtype"]), Tensor(weight).astype(given["dtype"])
    return grouped_product(
        [mint.transpose(rows, 0, 1) if given["turned"] else rows],
        [mint.transpose(factors, -1, -2) if given["weight_turned"] else factors],
        group_list=Tensor(given["stops"], given["list_dtype"]),
        split_item=given["split_item"],
        group_type=group_type,
    )[0]


X, W, Y = np.ones((4, 4), np.float32), np.ones((2, 4, 3), np.float32), np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _call(X, W, 0, turned=True), "takes no transposed x for groupType 0"),
        (lambda: _call(X, Y, 2, turned=False), "wants a transposed x for groupType 2"),
        (lambda: _call(X, np.ones((3, 4), np.float32), 2, weight_turned=True), "takes no transposed weight"),
        (lambda: _call(X, W, 0, dtype=ms.float64), "does not list DOUBLE for x"),
        (lambda: _call(X, W, 0, list_dtype=ms.int32), "does not list INT32 for groupListOptional"),
        (lambda: _call(X[:0], W, 0, stops=[0, 0]), "says nothing of empty tensors"),
        (lambda: _call(X, np.ones((1025, 4, 3), np.float32), 0, stops=[4] * 1025), "takes at most 1024 groups"),
        (lambda: _call(X, np.ones((2, 4, 65536), np.float32), 0), "wants the last dim of weight below 65536"),
    ],
)
def test_what_the_page_of_the_operator_excludes_is_refused_with_its_name(call, message) -> None:
    """An adapter that relies on more than is documented, and fails on hardware only."""
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"aclnnGroupedMatmulV4.md {message}"):
        call().asnumpy()


def test_a_product_of_nothing_is_left_undefined() -> None:
    """A caller who reads what CANN does not promise."""
    found = _call(X, Y, 2, stops=[0, 4]).asnumpy()
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], X.T @ Y)
