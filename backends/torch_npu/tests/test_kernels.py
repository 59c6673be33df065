# SPDX-License-Identifier: Apache-2.0
"""Kernels on the device: those of aten against the CPU's, and those that torch_npu adds against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch

ROWS = [3, 0, 5, 1]


def test_training_on_the_device_is_training_on_the_cpu() -> None:
    """Kernels that read before their stream is done, or write to the wrong place."""
    torch.manual_seed(0)
    on_cpu = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)
    )
    on_npu = copy.deepcopy(on_cpu).npu()
    x, target = torch.randn(5, 8), torch.tensor([0, 3, 1, 1, 2])
    for model, device in ((on_cpu, "cpu"), (on_npu, "npu")):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x.to(device)), target.to(device)).backward()
            optimizer.step()
    for expected, found in zip(on_cpu.parameters(), on_npu.parameters(), strict=True):
        assert torch.allclose(expected, found.cpu(), rtol=1e-5, atol=1e-6)


OPERATORS = {
    "matmul": lambda x: x @ x.transpose(0, 1),
    "softmax": lambda x: torch.softmax(x, -1),
    "topk": lambda x: torch.topk(x, 2).values,
    "sort": lambda x: torch.sort(x, stable=True).values,
    "index": lambda x: x.index_select(0, torch.tensor([2, 0, 2], device=x.device)),
    "where": lambda x: torch.where(x > 0, x, -2 * x),
    "repeat": lambda x: torch.repeat_interleave(x, torch.tensor([1, 0, 3, 2], device=x.device), dim=0),
    "gather": lambda x: x.gather(1, torch.tensor([[0], [1], [4], [2]], device=x.device)),
    "cumsum of a transposed view": lambda x: x.t().cumsum(0),
    "bfloat16": lambda x: (x.bfloat16() * 3).float(),
    "no rows": lambda x: x[:0].sum(0) + x.sum(0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_their_gradients_are_the_cpus(name: str) -> None:
    """Autograd formulas of torch_npu that go around what is served."""
    results = []
    for device in ("cpu", "npu"):
        x = torch.linspace(-2, 3, 20).reshape(4, 5).to(device).requires_grad_()
        y = OPERATORS[name](x)
        y.pow(2).sum().backward()
        results.append((y.detach().cpu(), x.grad.cpu()))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)


def grouped(x: torch.Tensor, weight: torch.Tensor, sizes: list[int], group_type: int, as_sizes: bool) -> torch.Tensor:
    """torch_npu's operator."""
    stops = torch.tensor(sizes, dtype=torch.int64) if as_sizes else torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    return torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=stops.npu(), split_item=3, group_type=group_type, group_list_type=int(as_sizes)
    )[0]


@pytest.mark.parametrize("as_sizes", [False, True])
def test_grouped_matmul_of_rows(as_sizes: bool) -> None:
    """Stops taken for sizes, or groups shifted by one."""
    x, weight = torch.randn(sum(ROWS), 6), torch.randn(4, 6, 8)
    expected = torch.cat([run @ w for run, w in zip(x.split(ROWS), weight, strict=True)])
    found = grouped(x.npu(), weight.npu(), ROWS, 0, as_sizes)
    assert torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_grouped_matmul_over_rows() -> None:
    """The product that weight gradients are made of; a group without rows is undefined."""
    g, x = torch.randn(sum(ROWS), 6), torch.randn(sum(ROWS), 8)
    found = grouped(g.npu().t(), x.npu(), ROWS, 2, False).cpu()
    for index, (a, b) in enumerate(zip(g.split(ROWS), x.split(ROWS), strict=True)):
        if ROWS[index]:
            assert torch.allclose(found[index], a.t() @ b, rtol=1e-5, atol=1e-6)


@pytest.mark.emulator
def test_grouped_matmul_refuses_what_its_contract_excludes() -> None:
    """An adapter that relies on more than is promised, and fails on hardware only."""
    x, weight = torch.randn(4, 6).npu(), torch.randn(1, 6, 8).npu()
    with pytest.raises(RuntimeError, match="sizes of a single group"):
        grouped(x, weight, [4], 0, True)
    with pytest.raises(RuntimeError, match="float64"):
        grouped(x.double(), weight.double(), [4], 0, False)
    with pytest.raises(RuntimeError, match="empty tensors"):
        grouped(x[:0], weight, [0], 0, False)
    with pytest.raises(RuntimeError, match="groups of 3 rows, x has 4"):
        grouped(x, weight, [3], 0, False)
    y = torch.randn(8, 4).npu()
    with pytest.raises(RuntimeError, match=r"aclnnGroupedMatmulV4\.md of CANN wants a transposed x"):
        grouped(torch.randn(6, 4).npu(), y.t().contiguous(), [4], 2, False)
    with pytest.raises(RuntimeError, match=r"aclnnGroupedMatmulV4\.md of CANN takes no transposed weight"):
        grouped(x.t(), y.t(), [4], 2, False)


@pytest.mark.emulator
def test_unpermuting_refuses_what_its_page_excludes() -> None:
    """A gather of a row twice, or indices of a type that hardware takes for another."""
    x = torch.randn(4, 6).npu()
    with pytest.raises(RuntimeError, match=r"aclnnMoeTokenUnpermute\.md of CANN wants no index twice"):
        torch.ops.npu.npu_moe_token_unpermute(x, torch.tensor([0, 1, 1, 2], dtype=torch.int32).npu())
    with pytest.raises(RuntimeError, match=r"aclnnMoeTokenUnpermute\.md of CANN wants an index for each row"):
        torch.ops.npu.npu_moe_token_unpermute(x, torch.tensor([0, 1], dtype=torch.int32).npu())
    with pytest.raises(RuntimeError, match=r"aclnnMoeTokenUnpermute\.md of CANN lists INT32"):
        torch.ops.npu.npu_moe_token_unpermute(x, torch.tensor([0, 1, 3, 2]).npu())


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_permuting_tokens_and_back_with_gradients(with_probabilities: bool) -> None:
    """An order that is not stable, places taken for their inverse, or gradients that miss a copy of a token."""
    torch.manual_seed(1)
    choices = (
        torch.tensor([[0, 4], [4, 3], [4, 2], [1, 1]]) if with_probabilities else torch.tensor([[3], [0], [3], [1]])
    )
    top_k = choices.shape[1]
    tokens, probabilities, cotangent = torch.randn(4, 6), torch.rand(4, top_k), torch.randn(4, 6)
    results = []
    for device in ("cpu", "npu"):
        t = tokens.clone().to(device).requires_grad_()
        p = probabilities.clone().to(device).requires_grad_()
        if device == "cpu":
            order = torch.argsort(choices.reshape(-1), stable=True)
            rows, places = t[order // top_k], torch.argsort(order)
            back = rows[places]
            if with_probabilities:
                back = (back.reshape(4, top_k, 6) * p[:, :, None]).sum(1)
        else:
            rows, places = torch.ops.npu.npu_moe_token_permute(t, choices.npu())
            back = torch.ops.npu.npu_moe_token_unpermute(rows, places, p if with_probabilities else None)
        (back * cotangent.to(device)).sum().backward()
        gradients = [t.grad.cpu()] + ([p.grad.cpu()] if with_probabilities else [])
        results.append([rows.detach().cpu(), places.cpu().long(), back.detach().cpu(), *gradients])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
