# SPDX-License-Identifier: Apache-2.0
"""Grouped products against float64 NumPy: native kernel and loop, every gradient, empty groups, odd sizes."""

import itertools

import hyperep_torch
import numpy as np
import pytest
import torch
from hyperep_torch import grouped, products

SIZES = {
    "mixed": [3, 0, 5, 1],
    "first and last empty": [0, 4, 5, 0],
    "one hot": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
}
# Relative error of one rounding of the result; sums are accumulated in at least float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def _data(sizes, dim, hidden, dtype):
    """Rows, weights and a cotangent of the product, of size O(1)."""
    rng = np.random.default_rng(sum(sizes) + dim)
    shapes = [(sum(sizes), dim), (len(sizes), hidden, dim), (sum(sizes), hidden)]
    # Rounded first, so that the reference sees the same numbers.
    return [torch.from_numpy(rng.normal(size=s)).to(dtype) for s in shapes]


def _reference(sizes, function, *tensors):
    """Values and gradients in float64, by a loop that autograd records."""
    *inputs, g = [t.detach().double().requires_grad_() for t in tensors]
    x, *weights = inputs
    starts = np.cumsum([0, *sizes])
    parts = [function(x[a:b], *(w[e] for w in weights)) for e, (a, b) in enumerate(itertools.pairwise(starts))]
    y = torch.cat(parts)
    return [y, *torch.autograd.grad(y, inputs, g)]


def _assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.detach().cpu().double() - expected.detach()).abs().flatten()
    scale = expected.detach().abs().flatten()
    # Of nothing but zeros, nothing else is close.
    assert max(error.tolist(), default=0.0) <= TOLERANCE[dtype] * max(scale.tolist(), default=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(8, 16), (5, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matmul_and_its_gradients(sizes, dim, hidden, dtype):
    x, w, g = _data(sizes, dim, hidden, dtype)
    inputs = [x.requires_grad_(), w.requires_grad_()]
    for count_dtype in (torch.int32, torch.int64):
        y = grouped.grouped_matmul(*inputs, torch.tensor(sizes, dtype=count_dtype))
        # A transposed copy has the same values but is not contiguous.
        found = [y, *torch.autograd.grad(y, inputs, g.t().contiguous().t())]
        for actual, expected in zip(found, _reference(sizes, lambda x, w: x @ w.t(), x, w, g), strict=True):
            _assert_close(actual, expected, dtype)


def test_a_group_without_rows_gets_a_zero_gradient_not_none():
    x, w, _ = _data(SIZES["mixed"], 8, 16, torch.float32)
    w.requires_grad_()
    grouped.grouped_matmul(x, w, torch.tensor(SIZES["mixed"])).sum().backward()
    assert torch.equal(w.grad[1], torch.zeros(16, 8))
    assert w.grad[[0, 2, 3]].abs().amin(dim=(1, 2)).gt(0).all()


def test_only_what_is_needed_is_computed(monkeypatch):
    x, w, _ = _data(SIZES["mixed"], 8, 16, torch.float32)
    calls = []
    monkeypatch.setattr(grouped, "columns_product", lambda *_: calls.append("weight"))
    grouped.grouped_matmul(x.requires_grad_(), w, torch.tensor(SIZES["mixed"])).sum().backward()
    assert x.grad is not None
    assert calls == []


def test_old_torch_without_grouped_mm_uses_the_loop(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    x, w, _ = _data(SIZES["mixed"], 8, 16, torch.float32)
    y = grouped.grouped_matmul(x, w, torch.tensor(SIZES["mixed"]))
    expected = _reference(SIZES["mixed"], lambda x, w: x @ w.t(), x, w, torch.ones_like(y))[0]
    _assert_close(y, expected, torch.float32)


def test_rows_and_weights_that_start_at_an_odd_address():
    x, w, _ = _data(SIZES["mixed"], 8, 16, torch.float32)
    shifted = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, w)]
    assert all(t.data_ptr() % 16 for t in shifted)
    sizes = torch.tensor(SIZES["mixed"])
    assert torch.equal(grouped.grouped_matmul(*shifted, sizes), grouped.grouped_matmul(x, w, sizes))


def test_autocast_decides_the_dtype():
    x, w, _ = _data(SIZES["mixed"], 8, 16, torch.float32)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped.grouped_matmul(x, w, torch.tensor(SIZES["mixed"]))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "weight", "sizes", "message"),
    [
        (torch.ones(4, 3), torch.ones(2, 5, 4), torch.tensor([2, 2]), r"x \(4, 3\), weight \(2, 5, 4\)"),
        (torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([4]), r"group_sizes \(1,\); they must be"),
        (torch.ones(4, 3), torch.ones(2, 5, 3).double(), torch.tensor([2, 2]), "cast to one dtype"),
        (torch.ones(4, 3), torch.ones(2, 3, 5), torch.tensor([2, 2]), "given with transposed=True"),
        (torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([2, 1]), r"group_sizes=\[2, 1\] sum to 3"),
    ],
)
def test_what_does_not_fit_is_refused(rows, weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped.grouped_matmul(rows, weight, sizes)


@pytest.mark.parametrize(
    ("bias", "message"),
    [(torch.ones(2, 3), r"bias \(2, 3\); the bias must be"), (torch.ones(2, 5).double(), "bias in torch.float64")],
)
def test_a_bias_that_does_not_fit_is_refused(bias, message):
    with pytest.raises(ValueError, match=message):
        hyperep_torch.grouped_matmul(torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([2, 2]), bias=bias)


def _linear_of_each(sizes, transposed, x, w, b, g):
    return _reference(sizes, lambda x, w, b: x @ (w if transposed else w.t()) + b, x, w, b, g)


def _with_bias(sizes, dim, hidden, dtype, transposed, device="cpu"):
    x, w, g = (t.to(device) for t in _data(sizes, dim, hidden, dtype))
    w = w.transpose(1, 2).contiguous() if transposed else w
    b = torch.linspace(-2, 3, len(sizes) * hidden).reshape(len(sizes), hidden).to(device, dtype)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    counts = torch.tensor(sizes, device=device)
    return inputs, counts, g, [t.cpu() for t in _linear_of_each(sizes, transposed, *(t.cpu() for t in (*inputs, g)))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(8, 16), (5, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_layouts_with_a_bias(sizes, dim, hidden, dtype, transposed):
    inputs, counts, g, wanted = _with_bias(sizes, dim, hidden, dtype, transposed)
    y = hyperep_torch.grouped_matmul(*inputs[:2], counts, bias=inputs[2], transposed=transposed)
    grads = torch.autograd.grad(y, inputs, g)
    assert all(grad.is_contiguous() for grad in grads)
    for actual, expected in zip([y, *grads], wanted, strict=True):
        _assert_close(actual, expected, dtype)


def test_a_transposed_weight_and_its_gradient_are_not_copied(monkeypatch):
    (x, w, b), counts, *_ = _with_bias(SIZES["mixed"], 8, 16, torch.float32, transposed=True)
    read = []
    product = grouped.rows_product
    monkeypatch.setattr(grouped, "rows_product", lambda x, w, runs: read.append(w.data_ptr()) or product(x, w, runs))
    grouped.grouped_matmul(x, w, counts, bias=b, transposed=True).sum().backward()
    assert read == [w.data_ptr()] * 2
    assert w.grad.stride() == w.stride()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_with_a_bias_is_one_graph(transposed):
    inputs, counts, g, wanted = _with_bias(SIZES["mixed"], 8, 16, torch.float32, transposed)
    layer = lambda x, w, b, n: hyperep_torch.grouped_matmul(x, w, n, bias=b, transposed=transposed)  # noqa: E731
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs, counts)
    for actual, expected in zip([y, *torch.autograd.grad(y, inputs, g)], wanted, strict=True):
        _assert_close(actual, expected, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(64, 128), (60, 68)], ids=["aligned", "odd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_layouts_with_a_bias_on_cuda(sizes, dim, hidden, dtype, transposed):
    inputs, counts, g, wanted = _with_bias(sizes, dim, hidden, dtype, transposed, "cuda")
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.cuda.set_sync_debug_mode("error" if products.has_native_kernel(counts.device, dtype) else "default")
    try:
        y = grouped.grouped_matmul(*leaves[:2], counts, bias=leaves[2], transposed=transposed)
        found = [y, *torch.autograd.grad(y, leaves, g)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, expected in zip(found, wanted, strict=True):
        _assert_close(actual, expected, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [(64, 128), (60, 68)], ids=["aligned", "odd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_matmul_on_cuda(sizes, dim, hidden, dtype):
    x, w, g = _data(sizes, dim, hidden, dtype)
    on_device = [x.cuda().requires_grad_(), w.cuda().requires_grad_()]
    counts, cotangent = torch.tensor(sizes).cuda(), g.cuda()
    native = products.has_native_kernel(counts.device, dtype)
    torch.cuda.set_sync_debug_mode("error" if native else "default")
    try:
        y = grouped.grouped_matmul(*on_device, counts)
        found = [y, *torch.autograd.grad(y, on_device, cotangent)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, expected in zip(found, _reference(sizes, lambda x, w: x @ w.t(), x, w, g), strict=True):
        _assert_close(actual, expected, dtype)
