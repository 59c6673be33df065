# SPDX-License-Identifier: Apache-2.0
"""A backward for inputs alone computes no product for weights, and the other way round."""

import pytest
import torch
from hyperep_torch import grouped, packed, swiglu

SIZES = torch.tensor([2, 0, 3])


def _weights(function):
    shapes = {
        "grouped_matmul": [(3, 5, 4)],
        "grouped_swiglu": [(3, 5, 4), (3, 4, 5), (3, 5, 4)],
        "packed_swiglu": [(3, 10, 4), (3, 4, 5)],
    }[function]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


FUNCTIONS = {
    "grouped_matmul": grouped.grouped_matmul,
    "grouped_swiglu": swiglu.grouped_swiglu,
    "packed_swiglu": packed.packed_swiglu,
}


@pytest.fixture
def products(monkeypatch):
    """The products for weights, as they are computed."""
    made = []
    for module in (grouped, swiglu, packed):
        monkeypatch.setattr(
            module,
            "columns_product",
            lambda g, x, runs, real=module.columns_product: made.append(1) or real(g, x, runs),
        )
    return made


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.composes("pipelines", "a backward for inputs computes no product of weights")
def test_products_are_computed_in_the_backward_that_asks_for_them(products, function, leaf):
    torch.manual_seed(0)
    x, weights = torch.randn(5, 4, requires_grad=True), _weights(function)
    used = weights if leaf else [w * 1.0 for w in weights]
    out = FUNCTIONS[function](x, *used, SIZES).sin().sum()
    (only_x,) = torch.autograd.grad(out, x, retain_graph=True)
    assert len(products) == 0
    only_weights = torch.autograd.grad(out, weights, retain_graph=True)
    assert len(products) == len(weights)
    out.backward()
    assert len(products) == 2 * len(weights)
    for found, p in zip((only_x, *only_weights), (x, *weights), strict=True):
        torch.testing.assert_close(found, p.grad)


def test_a_written_backward_is_told(platform):
    asked = []

    def backward(residuals, cotangents, needed):
        asked.append(needed)
        return cotangents[0], cotangents[0], None

    function = platform.custom_vjp(lambda x, w, i: (x + w + i, ()), backward)
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    out = function(x, w, torch.ones(2, dtype=torch.int64)).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    torch.autograd.grad(out, w, retain_graph=True)
    out.backward(inputs=[x], retain_graph=True)
    out.backward()
    assert asked == [(True, False, False), (False, True, False), (True, False, False), (True, True, False)]
