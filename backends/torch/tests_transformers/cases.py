# SPDX-License-Identifier: Apache-2.0
"""What each rank does: a stock model whole and one whose experts are spread, on data that differ from rank to rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from architectures import VOCABULARY, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import hyperep_torch.transformers as hep

TOLERANCE = 1e-5


def batch(rank: int, tokens: int = 13) -> torch.Tensor:
    """Ids ``[2, 13 + rank]`` of this rank: no two ranks have the same, nor as many."""
    return torch.randint(3, VOCABULARY, (2, tokens + rank), generator=torch.Generator().manual_seed(100 + rank))


def ep_mesh() -> Any:
    """All ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest deviation, relative to the largest entry; NaN where that is nothing or anything is NaN."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    scale = reference.abs().max().item()
    return (value - reference).abs().max().item() / scale if scale > 1e-7 else float("nan")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """Its mean over the ranks."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def require_same_gradients(model: nn.Module, reference: nn.Module, *, reduced: bool = False) -> None:
    """Each gradient is the mean over ranks of what the whole *reference* gets, and no parameter lacks one.

    *reduced*: somebody has averaged the gradients of replicated parameters; else it is done here.
    """
    compared = 0
    for (name, found), (other, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        name = name.removeprefix("module.")
        assert name == other
        assert (found.grad is None) == (wanted.grad is None), name
        if wanted.grad is None:
            continue
        expected = averaged(wanted.grad)
        got = whole(found.grad) if isinstance(found, DTensor) or reduced else averaged(found.grad)
        if expected.abs().max() > 1e-7:
            assert relative(got, expected) < TOLERANCE, (name, relative(got, expected))
            compared += 1
    assert compared > 10
    router = [n for n, p in reference.named_parameters() if ("gate" in n or "router" in n) and p.grad is not None]
    assert router, "no router among the parameters that were compared"


def losses_and_gradients(platform: Any, name: str) -> None:
    """Logits, loss and every gradient are those of the whole model, computed by its own forward."""
    reference = build(name)
    reference.config._experts_implementation = "eager"
    model = copy.deepcopy(reference)
    hep.expert_parallelize(model, ep_mesh())
    ids = batch(platform.rank)
    with hep.load_report(model) as loads:
        out = model(input_ids=ids, labels=ids)
    expected = reference(input_ids=ids, labels=ids)
    assert relative(out.logits, expected.logits) < TOLERANCE
    assert abs(out.loss.item() - expected.loss.item()) < TOLERANCE * abs(expected.loss.item())
    out.loss.backward()
    expected.loss.backward()
    require_same_gradients(model, reference)
    choices = sum(2 * (13 + rank) for rank in range(platform.world_size))
    for load in loads:
        assert load.tokens_per_expert.shape == (8,)
        assert load.tokens_per_expert.sum().item() % choices == 0
        assert load.tokens_per_expert.sum().item() > 0
