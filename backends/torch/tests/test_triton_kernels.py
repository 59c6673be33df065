# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against plain PyTorch in float64: on a GPU if there is one, else in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before they are imported
pytest.importorskip("triton")

from hyperep_torch import triton_kernels as kernels  # noqa: E402

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
WIDTHS = [24, 130, 2050]
TOKENS, TERMS = 5, 3


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def relative(got, want):
    return ((got.cpu().double() - want).norm() / want.norm()).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gather_rows(width, dtype, tolerance):
    x, index = normal(9, width, dtype=dtype), torch.tensor([8, 0, 3, 3], device=DEVICE)
    assert torch.equal(kernels.gather_rows(x, index), x[index])
    assert kernels.gather_rows(x, index[:0]).shape == (0, width)
    assert kernels.gather_rows(x[:0], index[:0]).shape == (0, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_sum_rows_and_its_gradients(width, dtype, tolerance):
    rows, weights = normal(TOKENS * TERMS, width, dtype=dtype), normal(TOKENS, TERMS, dtype=torch.float32)
    index, g = torch.randperm(TOKENS * TERMS).view(TOKENS, TERMS), normal(TOKENS, width, dtype=dtype)
    exact_rows, exact_weights = (t.cpu().double().requires_grad_() for t in (rows, weights))
    want = (exact_rows[index] * exact_weights[:, :, None]).sum(1)
    want.backward(g.cpu().double())
    index = index.to(DEVICE)
    assert relative(kernels.sum_rows(rows, index, weights), want) < tolerance
    assert relative(kernels.sum_rows(rows, index, None), rows.cpu().double()[index.cpu()].sum(1)) < tolerance
    grad_rows, grad_weights = kernels.sum_rows_backward(g, rows, index, weights)
    assert relative(grad_rows, exact_rows.grad) < tolerance
    assert relative(grad_weights, exact_weights.grad) < tolerance


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu_and_its_gradients(width, dtype, tolerance):
    gate, up, g = (normal(3, width, dtype=dtype) for _ in range(3))
    exact_gate, exact_up = (t.cpu().double().requires_grad_() for t in (gate, up))
    want = exact_gate / (1 + torch.exp(-exact_gate)) * exact_up
    want.backward(g.cpu().double())
    assert relative(kernels.swiglu(gate, up), want) < tolerance
    hidden, grad_gate, grad_up = kernels.swiglu_backward(g, gate, up)
    assert relative(hidden, want) < tolerance
    assert relative(grad_gate, exact_gate.grad) < tolerance
    assert relative(grad_up, exact_up.grad) < tolerance


@pytest.mark.parametrize("named", [0, 4, 11])
def test_terms_without_a_row(named):
    place = torch.randperm(TOKENS * TERMS)
    index = torch.full((TOKENS * TERMS,), named + 1)
    index[place[:named]] = torch.arange(named)
    index = index.view(TOKENS, TERMS)
    rows, g = normal(named, 24, dtype=torch.float32), normal(TOKENS, 24, dtype=torch.float32)
    weights = normal(TOKENS, TERMS, dtype=torch.float32)
    weights.view(-1)[place[named:].to(DEVICE)] = torch.nan  # of no row, so of no interest
    there = (index < named)[:, :, None]
    exact_rows, exact_weights = (t.cpu().double().nan_to_num().requires_grad_() for t in (rows, weights))
    padded = torch.cat([exact_rows, torch.zeros(1, 24, dtype=torch.float64)])[index.clamp(max=named)]
    want = (padded * exact_weights[:, :, None] * there).sum(1)
    want.backward(g.cpu().double())
    index = index.to(DEVICE)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(kernels.sum_rows(rows, index, weights).cpu().double(), want.detach(), **close)
    grad_rows, grad_weights = kernels.sum_rows_backward(g, rows, index, weights)
    torch.testing.assert_close(grad_rows.cpu().double(), exact_rows.grad, **close)
    torch.testing.assert_close(grad_weights.cpu().double(), exact_weights.grad * there[:, :, 0], **close)


@pytest.mark.parametrize("sizes", [(0, 3, 0, 2, 0), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1)], ids=str)
def test_only_groups_without_rows_are_cleared(sizes):
    product = normal(5, 130, 7, dtype=torch.float32)
    before, stops = product.clone(), torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    kernels.clear_empty_groups_(product, stops)
    for group, size in enumerate(sizes):
        assert torch.equal(product[group], before[group] if size else torch.zeros_like(before[group]))
