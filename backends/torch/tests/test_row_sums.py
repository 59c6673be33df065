# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by one pass over them, against the platform's default, which gathers, weights and adds."""

import pytest
import torch
from hyperep_torch import row_sums

from hyperep.platform.base import PlatformBase

TOKENS, TERMS, DIM = 7, 3, 5


def _case(dtype, index_dtype=torch.int64, tokens=TOKENS):
    torch.manual_seed(tokens)
    order = torch.randperm(tokens * TERMS)
    # A transposed tensor: rows need not be contiguous.
    rows = torch.randn(DIM, tokens * TERMS, dtype=dtype).T.requires_grad_()
    weights = torch.rand(tokens, TERMS, dtype=dtype).requires_grad_()
    cotangent = torch.randn(DIM, tokens, dtype=dtype).T
    return rows, order.reshape(tokens, TERMS).to(index_dtype), torch.argsort(order).to(index_dtype), weights, cotangent


def _results(function, rows, index, inverse, weights, cotangent):
    inputs = [rows] if weights is None else [rows, weights]
    out = function(rows, index, inverse, weights)
    return [out, *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_the_defaults(platform, dtype, index_dtype, weighted, tokens):
    rows, index, inverse, weights, cotangent = _case(dtype, index_dtype, tokens)
    weights = weights if weighted else None
    assert row_sums.can_fuse(rows, index, weights)
    wanted = _results(
        lambda *a: PlatformBase.sum_rows(platform, *a), rows, index.long(), inverse.long(), weights, cotangent
    )
    for ours, theirs in zip(_results(platform.sum_rows, rows, index, inverse, weights, cotangent), wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows_named", [0, 4, 17])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_terms_without_a_row(platform, index_dtype, weighted, rows_named):
    torch.manual_seed(rows_named)
    place = torch.randperm(TOKENS * TERMS)
    inverse = place[:rows_named]  # which terms have a row
    index = torch.full((TOKENS * TERMS,), rows_named + 2)
    index[inverse] = torch.arange(rows_named)
    rows = torch.randn(rows_named, DIM, requires_grad=True)
    weights = torch.rand(TOKENS, TERMS)
    weights.view(-1)[place[rows_named:]] = torch.nan
    weights = weights.requires_grad_() if weighted else None
    index, cotangent = index.view(TOKENS, TERMS), torch.randn(TOKENS, DIM)
    wanted = _results(lambda *a: PlatformBase.sum_rows(platform, *a), rows, index, inverse, weights, cotangent)
    inputs = rows, index.to(index_dtype), inverse.to(index_dtype), weights, cotangent
    for ours, theirs in zip(_results(platform.sum_rows, *inputs), wanted, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, theirs)


def test_narrow_dtypes_and_mixed_ones_are_summed_in_float32(platform):
    rows, index, inverse, weights, cotangent = _case(torch.bfloat16)
    assert not row_sums.can_fuse(rows, index, weights)
    assert not row_sums.can_fuse(rows.float(), index, weights)
    out, grad_rows, grad_weights = _results(platform.sum_rows, rows, index, inverse, weights, cotangent)
    exact = (rows.float()[index] * weights.float()[:, :, None]).sum(1)
    assert torch.equal(out, exact.to(torch.bfloat16))
    assert (grad_rows.dtype, grad_weights.dtype) == (torch.bfloat16, torch.bfloat16)


def test_no_weighted_rows_are_kept(platform):
    rows, index, inverse, weights, _ = _case(torch.float32)
    kept = platform.instruments.saved_bytes(lambda: platform.sum_rows(rows, index, inverse, weights), [])
    assert kept == TOKENS * TERMS * (DIM * 4 + 4 + 8 + 8)  # rows, weights, index and inverse


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_only_what_is_needed_is_kept_and_computed(platform, frozen):
    rows, index, inverse, weights, cotangent = _case(torch.float32)
    rows, weights = (x.detach() if name == frozen else x for name, x in (("rows", rows), ("weights", weights)))
    kept = platform.instruments.saved_bytes(lambda: platform.sum_rows(rows, index, inverse, weights), [])
    assert kept == TOKENS * TERMS * (4 + 8 + 8 + (DIM * 4 if frozen == "rows" else 0))
    (found,) = torch.autograd.grad(
        platform.sum_rows(rows, index, inverse, weights), weights if frozen == "rows" else rows, cotangent
    )
    exact = rows.detach().double()[index] @ cotangent.double()[:, :, None]  # [T, K, 1]
    if frozen == "weights":
        exact = (cotangent[:, None] * weights[:, :, None]).reshape(-1, DIM)[inverse]
    torch.testing.assert_close(found, exact.reshape(found.shape).float())


def test_tokens_that_go_nowhere_sum_to_zero(platform):
    nothing = torch.zeros(0, dtype=torch.int64)
    out = platform.sum_rows(torch.zeros(0, DIM), nothing.reshape(TOKENS, 0), nothing, torch.zeros(TOKENS, 0))
    assert torch.equal(out, torch.zeros(TOKENS, DIM))
