# SPDX-License-Identifier: Apache-2.0
"""NumPy in the host's memory: who owns what, what is written into, and that results outlive the pool's reuse."""

import mindspore as ms
import numpy as np
import pytest
from hyperep_mindspore import host
from hyperep_mindspore.kernels import CPU, GPU
from mindspore import Tensor, ops


def _array(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _address(array):
    return array.__array_interface__["data"][0]


def test_a_whole_tensor_is_opened_without_a_copy_and_is_read_only():
    x = Tensor(_array(4, 3))
    array = host.opened(x)
    assert _address(array) == x.data_ptr()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    np.testing.assert_array_equal(x.asnumpy(), _array(4, 3))


@pytest.mark.parametrize("view", [lambda x: x[1:3], lambda x: x.T, lambda x: x[:, 1], lambda x: x[:0]])
def test_views_are_opened_as_what_they_show(view):
    np.testing.assert_array_equal(host.opened(view(Tensor(_array(4, 3)))), view(_array(4, 3)))


@pytest.mark.parametrize(
    "view",
    [lambda a: a, lambda a: a[1:3], lambda a: a.T, lambda a: a.reshape(-1), lambda a: np.broadcast_to(a, (2, 4, 3))],
)
def test_a_tensor_shares_memory_with_no_array_but_its_own(view):
    a = _array(4, 3)
    given = view(a)
    tensor = host.from_array(given, ms.float32)
    expected = given.copy()
    if given is not a:
        a[:] = 0
    np.testing.assert_array_equal(tensor.asnumpy(), expected)
    assert tensor.is_contiguous()


def test_what_was_opened_is_never_what_a_tensor_is_made_of():
    x = Tensor(_array(4, 3))
    y = host.from_array(host.opened(x), ms.float32)
    assert y.data_ptr() != x.data_ptr()
    z = host.copied(x)
    assert z.data_ptr() != x.data_ptr()
    np.testing.assert_array_equal(z.asnumpy(), _array(4, 3))


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_narrow_floats_are_computed_in_float32(dtype):
    x = Tensor([1.5, -2.0, 3.0]).astype(dtype)
    assert host.widened(x).dtype == np.float32
    assert host.widened(x).tolist() == [1.5, -2.0, 3.0]
    back = host.from_array(host.widened(x), dtype)
    assert back.dtype == dtype
    assert ops.cast(back, ms.float32).asnumpy().tolist() == [1.5, -2.0, 3.0]
    assert ops.cast(host.copied(x), ms.float32).asnumpy().tolist() == [1.5, -2.0, 3.0]


def test_values_that_operators_still_make_are_waited_for():
    x = Tensor(_array(400, 300))
    for _ in range(20):
        y = x
        for _ in range(30):
            y = y + 1.0
        np.testing.assert_allclose(host.opened(y), _array(400, 300) + 30, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "bool"])
def test_take_is_the_gather_and_adds_up_what_is_gathered_twice(platform, dtype, axis):
    x = (4 * _array(5, 6, 3)).astype(dtype)
    index = np.array([4, 0, 0, 2, 0, 2])
    if axis:
        index = index % 3
    out, pullback = platform.vjp(lambda x: CPU.take(x, Tensor(index), axis), platform.from_host(x))
    np.testing.assert_array_equal(out.asnumpy(), x.take(index, axis))
    if dtype.startswith("float"):
        g = _array(*out.shape, seed=1).astype(dtype)
        expected = np.zeros(x.shape)
        np.add.at(np.moveaxis(expected, axis, 0), index, np.moveaxis(g.astype(np.float64), axis, 0))
        tolerance = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3}[dtype]
        np.testing.assert_allclose(pullback(Tensor(g))[0].asnumpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [0, 5, 12])
def test_sums_of_rows(platform, missing, weighted):
    """Against plain loops, where the rows that no term names are NaN in their neighbour's place too."""
    tokens, terms, width = 4, 3, 5
    rows = tokens * terms - missing
    place = np.random.default_rng(3).permutation(tokens * terms)
    index = np.where(place < rows, place, rows + place).reshape(tokens, terms)
    inverse = np.argsort(place)[:rows]
    x, w, g = _array(rows, width), _array(tokens, terms, seed=1), _array(tokens, width, seed=2)
    w_given = np.where(index < rows, w, np.nan).astype(np.float32)
    at, back = Tensor(index), Tensor(inverse)

    def function(x, *weights):
        return platform.sum_rows(x, at, back, *weights)

    given = [platform.from_host(x), *([platform.from_host(w_given)] if weighted else [])]
    out, pullback = platform.vjp(function, *given)
    expected, grad_x, grad_w = np.zeros((tokens, width)), np.zeros((rows, width)), np.zeros((tokens, terms))
    for t in range(tokens):
        for k in range(terms):
            if index[t, k] < rows:
                factor = w[t, k] if weighted else 1.0
                expected[t] += factor * x[index[t, k]]
                grad_x[index[t, k]] += factor * g[t]
                grad_w[t, k] = x[index[t, k]] @ g[t]
    made = [out, *pullback(platform.from_host(g))]
    for got, want in zip(made, [expected, grad_x, *([grad_w] if weighted else [])], strict=True):
        np.testing.assert_allclose(got.asnumpy(), want, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_reaches_its_own_token_alone(platform):
    x = np.ones((2, 3), np.float32)
    x[1] = np.nan
    index, inverse = Tensor(np.array([[0, 2], [1, 3]])), Tensor(np.array([0, 2]))
    out = platform.sum_rows(platform.from_host(x), index, inverse, platform.xp.ones((2, 2)))
    assert np.isfinite(out.asnumpy()[0]).all()
    assert np.isnan(out.asnumpy()[1]).all()


def _experts(platform):
    sizes = platform.from_host(np.array([3, 0, 5]))
    given = [platform.from_host(_array(*s, seed=s[0])) for s in ((8, 4), (3, 6, 4), (3, 4, 6), (3, 6, 4))]
    return platform.vjp(lambda *inputs: platform.grouped_swiglu(*inputs, sizes), *given), given


def test_results_outlive_their_inputs_and_the_reuse_of_memory(platform):
    """What is returned, and what is kept for backward, is right after everything else was freed and overwritten."""
    index = platform.from_host(np.array([2, 1, 0, 3, 4, 5, 6, 7]))
    (out, pullback), given = _experts(platform)
    expected = [t.asnumpy().copy() for t in (out, *pullback(platform.from_host(_array(8, 4))))]
    before = [t.asnumpy().copy() for t in given]
    del out, pullback, given

    (out, pullback), given = _experts(platform)
    moved = platform.permute_rows(out * 1, index, index)
    kept = given[0] * 1
    del given
    stale = [ops.full((n, m), np.nan, dtype=ms.float32) for n in (3, 6, 8) for m in (4, 6) for _ in range(50)]
    for tensor in stale:
        tensor.asnumpy()
    del stale
    gradients = pullback(platform.from_host(_array(8, 4)))
    more = [ops.full((8, 4), np.nan, dtype=ms.float32).asnumpy() for _ in range(50)]
    assert np.isnan(more).all()
    for got, want in zip((out, *gradients), expected, strict=True):
        np.testing.assert_array_equal(got.asnumpy(), want)
    np.testing.assert_array_equal(moved.asnumpy(), expected[0][[2, 1, 0, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(kept.asnumpy(), before[0])


def test_the_table_of_the_host_is_what_mindspore_computes(platform):
    """Each entry that NumPy serves on the CPU, beside MindSpore's own of the other devices."""
    x, index = platform.from_host(_array(6, 4)), Tensor(np.array([5, 0, 0]))
    np.testing.assert_array_equal(CPU.take(x, index, 0).asnumpy(), GPU.take(x, index, 0).asnumpy())
    np.testing.assert_array_equal(CPU.copied(x.T).asnumpy(), GPU.copied(x.T).asnumpy())
    at = Tensor(np.array([[0, 3], [5, 1], [2, 4]]))
    inverse, w = Tensor(np.argsort([0, 3, 5, 1, 2, 4])), platform.from_host(_array(3, 2))
    ours, theirs = (k.sum_rows(platform, x, at, inverse, w).asnumpy() for k in (CPU, GPU))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
