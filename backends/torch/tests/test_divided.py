# SPDX-License-Identifier: Apache-2.0
"""Gradients that are divided where tokens come and go: those of experts are, and nobody else's."""

import copy

import pytest
import torch
from hyperep_torch.divided import can_divide, divide_gradients, divides_gradients
from hyperep_torch.wrapped import wrap_forward
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x, indices, weights, *, meanwhile=None):
        out = weights * torch.tanh(x @ self.weight)
        return out if meanwhile is None else out + meanwhile(x)


def _styled(experts):
    wrap_forward(experts, lambda inner, *inputs, **kwargs: inner(*inputs, **kwargs))
    return experts


def _gradients(experts, shared, by_name):
    x, weights = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (3, 1))
    indices, named = torch.zeros(4, 1, dtype=torch.int64), {}
    given = (x, indices, weights)
    if by_name:
        given, named = (), {"x": x, "indices": indices, "weights": weights}
    for parameter in (*experts.parameters(), *shared.parameters()):
        parameter.grad = None
    # Called twice, and with another way from the tokens to the loss.
    out = experts(*given, **named, meanwhile=shared) + experts(*given, **named) + x
    out.square().sum().backward()
    return [x.grad, weights.grad, *(p.grad for p in shared.parameters())], experts.weight.grad


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_gradients_of_experts_and_no_others(by_name, copied):
    torch.manual_seed(0)
    experts, shared = Experts(), nn.Linear(3, 3).double()
    divided = _styled(copy.deepcopy(experts))
    divide_gradients(divided, 3)
    divide_gradients(divided, 3)  # stays as it is
    if copied:
        divided = copy.deepcopy(divided)
    torch.manual_seed(1)
    wanted, wanted_weight = _gradients(experts, shared, by_name)
    torch.manual_seed(1)
    found, found_weight = _gradients(divided, shared, by_name)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(3 * found_weight, wanted_weight, rtol=1e-13, atol=1e-13)


def test_what_is_called_without_a_style_is_not_divided():
    assert can_divide(nn.ModuleList([_styled(Experts()), _styled(Experts())]))
    assert not can_divide(nn.ModuleList([_styled(Experts()), Experts()]))
    assert not divides_gradients(_styled(Experts()))
