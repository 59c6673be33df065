# SPDX-License-Identifier: Apache-2.0
"""``custom_vjp``, ``vjp``, ``permute_rows`` and what PyTorch's own tools see of them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint


def _product(platform, log=None):
    """x * y with a backward that is told apart from the true one by a factor of ten."""

    def forward(x, y):
        assert not torch.is_grad_enabled()
        return (x * y, x + y), (x, y)

    def backward(residuals, cotangents, needed):
        if log is not None:
            log.append((cotangents, needed))
        (x, y), (g, _) = residuals, cotangents
        return (10 * g * y if needed[0] else None, 10 * g * x if needed[1] else None)

    return platform.custom_vjp(forward, backward)


def test_the_written_backward_is_used_and_unused_outputs_give_zeros(platform):
    log = []
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    product, _ = _product(platform, log)(x, y)
    product.sum().backward()
    assert x.grad.tolist() == [50.0, 70.0]
    (cotangents, needed) = log[0]
    assert needed == (True, False)
    assert [c.tolist() for c in cotangents] == [[1.0, 1.0], [0.0, 0.0]]


def test_a_function_may_be_called_many_times_before_any_backward(platform):
    function = _product(platform)
    inputs = [torch.tensor([float(i)], requires_grad=True) for i in range(3)]
    outputs = [function(x, x + 1)[0] for x in inputs]
    for x, y in reversed(list(zip(inputs, outputs, strict=True))):
        y.backward()
        assert x.grad.item() == 10 * (2 * x.item() + 1)


def test_integer_outputs_and_inputs_have_no_gradient(platform):
    function = platform.custom_vjp(
        lambda x, i: ((x[i], i + 1), (i,)),
        lambda residuals, cotangents, needed: (torch.zeros(3).index_add(0, residuals[0], cotangents[0]), None),
    )
    x = torch.ones(3, requires_grad=True)
    taken, plus = function(x, torch.tensor([2, 2]))
    assert taken.requires_grad
    assert not plus.requires_grad
    taken.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 2.0]


def test_an_input_returned_as_it_is_still_has_a_gradient(platform):
    function = platform.custom_vjp(lambda x: (x, ()), lambda residuals, cotangents, needed: (3 * cotangents[0],))
    x = torch.ones(2, requires_grad=True)
    function(x).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_residuals_pass_saved_tensor_hooks(platform):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor * 2  # seen by backward, if residuals go through the hooks

    x, y = torch.tensor([2.0], requires_grad=True), torch.tensor([5.0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        product, _ = _product(platform)(x, y)
    product.backward()
    assert len(kept) == 2
    assert x.grad.item() == 100.0


def test_activation_checkpointing_recomputes_and_frees(platform):
    calls = []

    def forward(x):
        calls.append(1)
        return x.exp(), (x.exp(),)

    function = platform.custom_vjp(forward, lambda residuals, cotangents, needed: (residuals[0] * cotangents[0],))
    x = torch.tensor([0.5, -1.0], requires_grad=True)
    y = checkpoint(lambda x: function(function(x)), x, use_reentrant=False)
    assert len(calls) == 2
    y.sum().backward()
    assert len(calls) == 4
    expected = (x.exp().exp() * x.exp()).detach()
    assert torch.allclose(x.grad, expected, rtol=1e-6)


def test_residuals_die_with_the_graph(platform):
    import weakref

    alive = []

    def forward(x):
        residual = x * 2
        alive.append(weakref.ref(residual))
        return x + 1, (residual,)

    x = torch.ones(3, requires_grad=True)
    y = platform.custom_vjp(forward, lambda r, c, n: (c[0],))(x)
    assert alive[0]() is not None
    del y
    assert alive[0]() is None


def test_a_second_derivative_is_refused_and_not_wrong(platform):
    x = torch.ones(2, requires_grad=True)
    y = _product(platform)(x, x)[0]
    (g,) = torch.autograd.grad(y, x, torch.ones(2, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_vjp_gives_zeros_where_nothing_flows(platform):
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    unused = torch.nn.Parameter(torch.ones(2, 2))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def function(x, y, index):
        return x * weight, index + 1

    primals = torch.tensor([1.0, 2.0]), torch.ones(2), torch.tensor([1, 2])
    outputs, pullback = platform.vjp(function, *primals, parameters=[weight, unused, frozen])
    assert outputs[0].tolist() == [3.0, 8.0]
    gradients = pullback(torch.ones(()).expand(2), torch.zeros(2, dtype=torch.int64))
    expected = [[3.0, 4.0], [0.0, 0.0], [0, 0], [1.0, 2.0], [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0, 0.0]]
    assert [g.tolist() for g in gradients] == expected
    assert not any(g.requires_grad for g in gradients)
    assert weight.grad is None


def test_vjp_of_a_constant_is_zero(platform):
    _, pullback = platform.vjp(lambda x: torch.ones(2), torch.ones(3))
    assert pullback(torch.ones(2))[0].tolist() == [0.0, 0.0, 0.0]


def test_vjp_tells_the_same_tensor_given_twice_apart(platform):
    x = torch.tensor([2.0], requires_grad=True)
    _, pullback = platform.vjp(lambda a, b: a * a * b, x, x)
    assert [g.item() for g in pullback(torch.ones(1))] == [8.0, 4.0]
    assert x.grad is None


def test_vjp_works_where_gradients_are_off(platform):
    with torch.no_grad():
        _, pullback = platform.vjp(lambda x: x * x, torch.tensor([3.0]))
        assert pullback(torch.ones(1))[0].item() == 6.0


def test_pullback_wants_a_cotangent_for_each_output(platform):
    _, pullback = platform.vjp(lambda x: (x, x), torch.ones(1))
    with pytest.raises(ValueError, match="1 cotangents for 2 outputs"):
        pullback(torch.ones(1))


@pytest.mark.parametrize("rows", [7, 1, 0])
@pytest.mark.parametrize("tail", [(), (3,), (2, 2)], ids=["1-D", "2-D", "3-D"])
def test_permute_rows_and_its_gradient_are_gathers(platform, rows, tail):
    generator = torch.Generator().manual_seed(rows)
    index = torch.randperm(rows, generator=generator)
    inverse = torch.argsort(index)
    x = torch.randn(rows, *tail, generator=generator).requires_grad_()
    y = platform.permute_rows(x, index, inverse)
    assert torch.equal(y, x[index])
    assert y.requires_grad
    g = torch.randn(*reversed(y.shape), generator=generator).permute(*reversed(range(y.ndim)))  # not contiguous
    y.backward(g)
    assert torch.equal(x.grad, g[inverse])


def test_permute_rows_keeps_the_inverse_only(platform):
    kept = []
    index = torch.tensor([2, 0, 1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        platform.permute_rows(torch.ones(3, 5, requires_grad=True), index, torch.argsort(index))
    assert [k.tolist() for k in kept] == [[1, 2, 0]]


def test_stop_gradient(platform):
    x = torch.tensor([2.0], requires_grad=True)
    (platform.stop_gradient(x) * x).backward()
    assert x.grad.item() == 2.0


def test_a_pullback_is_there_where_no_gradient_is_wanted(platform):
    """Inside of a custom forward that nobody differentiates, vjp records nothing until its pullback is called."""
    saved = []

    def forward(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out, pullback = platform.vjp(lambda x: x * x * 3, x)
            assert not saved
            (gradient,) = pullback(torch.ones(3))
        return out + gradient, ()

    x = torch.tensor([1.0, 2.0, -1.0])
    with torch.no_grad():
        found = platform.custom_vjp(forward, lambda *parts: (None,))(x)
    torch.testing.assert_close(found, 3 * x * x + 6 * x)
    assert saved
