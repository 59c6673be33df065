# SPDX-License-Identifier: Apache-2.0
"""``grouped_swiglu`` on PyTorch: values, gradients, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F

GROUPS, DIM, HIDDEN = 4, 16, 8
SIZES = {"uneven": (3, 0, 5, 2), "last": (0, 0, 0, 7), "none": (0, 0, 0, 0)}


def arguments(sizes, dtype, dim=DIM, hidden=HIDDEN):
    torch.manual_seed(sum(sizes))
    shapes = [(sum(sizes), dim), (len(sizes), hidden, dim), (len(sizes), dim, hidden), (len(sizes), hidden, dim)]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(sum(sizes), dim, dtype=torch.float64).to(dtype)


def reference(x, w1, w2, w3, sizes):
    parts = zip(x.split(sizes), w1, w2, w3, strict=True)
    return torch.cat([(F.silu(rows @ a.t()) * (rows @ c.t())) @ b.t() for rows, a, b, c in parts])


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("width", [HIDDEN, 7], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_output_and_gradients_against_float64(platform, sizes, width, dtype, tolerance):
    tensors, g = arguments(sizes, dtype, hidden=width)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, want = platform.grouped_swiglu(*tensors, torch.tensor(sizes)), reference(*exact, sizes)
    out.backward(g)
    want.backward(g.double())
    assert relative(out, want) <= tolerance
    for got, expected in zip(tensors, exact, strict=True):
        assert got.grad.shape == expected.shape
        assert relative(got.grad, expected.grad) <= tolerance


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(platform, wanted):
    tensors, g = arguments(SIZES["uneven"], torch.float64)
    exact = [t.detach().requires_grad_() for t in tensors]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == wanted)
    platform.grouped_swiglu(*tensors, torch.tensor(SIZES["uneven"])).backward(g)
    reference(*exact, SIZES["uneven"]).backward(g)
    assert relative(tensors[wanted].grad, exact[wanted].grad) < 1e-13
    assert all(tensor.grad is None for i, tensor in enumerate(tensors) if i != wanted)


def test_backward_twice_gives_the_same(platform):
    # Catches a backward that writes into what it had kept.
    tensors, g = arguments(SIZES["uneven"], torch.float32)
    out = platform.grouped_swiglu(*tensors, torch.tensor(SIZES["uneven"]))
    first = torch.autograd.grad(out, tensors, g, retain_graph=True)
    second = torch.autograd.grad(out, tensors, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_cotangent_that_is_expanded_and_transposed(platform):
    tensors, _ = arguments(SIZES["uneven"], torch.float64)
    exact = [t.detach().requires_grad_() for t in tensors]
    platform.grouped_swiglu(*tensors, torch.tensor(SIZES["uneven"])).sum().backward()
    reference(*exact, SIZES["uneven"]).sum().backward()
    for got, expected in zip(tensors, exact, strict=True):
        assert relative(got.grad, expected.grad) < 1e-13


def test_keeps_the_rows_two_projections_the_weights_and_the_stops_and_nothing_else(platform):
    tensors, _ = arguments(SIZES["uneven"], torch.float32)
    x, w1, w2, w3 = tensors
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        platform.grouped_swiglu(*tensors, torch.tensor(SIZES["uneven"]))
    assert {t.data_ptr() for t in (x, w1, w2, w3)} <= {t.data_ptr() for t in kept}
    rows = sum(SIZES["uneven"])
    others = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in {p.data_ptr() for p in tensors})
    assert others == [(GROUPS,), (rows, HIDDEN), (rows, HIDDEN)]


def test_errors_name_the_shapes_and_dtypes(platform):
    (x, w1, w2, w3), _ = arguments(SIZES["uneven"], torch.float32)
    with pytest.raises(ValueError, match=r"w2 \(4, 8, 16\).*must be"):
        platform.grouped_swiglu(x, w1, w1, w3, torch.tensor(SIZES["uneven"]))
    with pytest.raises(ValueError, match=r"sum to 9, but there are 10 rows"):
        platform.grouped_swiglu(x, w1, w2, w3, torch.tensor((2, 0, 5, 2)))
    with pytest.raises(ValueError, match=r"w2 in torch.float64.*cast"):
        platform.grouped_swiglu(x, w1, w2.double(), w3, torch.tensor(SIZES["uneven"]))


def test_swiglu_alone_leaves_the_cotangent_as_it_is(platform):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    exact_gate, exact_up = (t.detach().clone().requires_grad_() for t in (gate, up))
    g = torch.randn(5, 3, dtype=torch.float64).t()
    before = g.clone()
    out, want = platform.swiglu(gate, up), F.silu(exact_gate) * exact_up
    out.backward(g)
    want.backward(g)
    assert torch.equal(g, before)
    for got, expected in ((out, want), (gate.grad, exact_gate.grad), (up.grad, exact_up.grad)):
        assert relative(got, expected) < 1e-13
