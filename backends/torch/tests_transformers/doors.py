# SPDX-License-Identifier: Apache-2.0
"""A stock model, and the same one with its experts spread, through either door; and what must be the same of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import hyperep_torch.transformers as hep
import torch
import torch.distributed as dist
from architectures import VOCABULARY, build
from faults import Fault, cut_router, leave_out_reduction
from hyperep_torch.full_state import saved_otherwise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

Door = Literal["inside transformers", "any model"]

NOTHING = 1e-7
"""Tensors whose entries are all smaller have no relative deviation."""


def batch(rank: int, tokens: int = 13) -> torch.Tensor:
    """Ids ``[2, 13 + rank]`` of this rank: no two ranks have the same, nor as many."""
    return torch.randint(3, VOCABULARY, (2, tokens + rank), generator=torch.Generator().manual_seed(100 + rank))


def ep_mesh() -> Any:
    """All ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """Its mean over the ranks."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """As a user does by hand who has neither DDP nor FSDP2 around a model."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad = averaged(parameter.grad)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest deviation, relative to the largest entry; infinite where anything is NaN or nothing to compare."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    scale = reference.abs().max().item()
    found = (value - reference).abs().max().item() / scale if scale > NOTHING else math.inf
    return found if math.isfinite(found) else math.inf


@dataclass
class Pair:
    """The two models, which have the same weights and this rank's data."""

    model: nn.Module
    reference: nn.Module
    """Whole, and computed by its own forward."""
    door: Door
    fault: Fault | None
    initial: dict[str, torch.Tensor] = field(init=False)
    """The weights of both, as long as there was no step."""

    def __post_init__(self) -> None:
        if self.fault == "router cut":
            cut_router(self.model)
        if self.fault == "reduction left out" and self.door == "inside transformers":
            leave_out_reduction(self.model)
        self.initial = {name: p.detach().clone() for name, p in self.reference.named_parameters()}

    def backward(self, ids: torch.Tensor, **inputs: Any) -> tuple[Any, Any]:
        """Outputs of both; then every gradient is the mean over the ranks."""
        outputs = []
        for each in (self.model, self.reference):
            each.zero_grad()
            outputs.append(each(input_ids=ids, labels=ids, **inputs))
            outputs[-1].loss.backward()
        average_gradients(self.reference)
        if self.door == "any model" and self.fault != "reduction left out":
            average_gradients(self.model)
        return outputs[0], outputs[1]

    def step(self, ids: torch.Tensor) -> None:
        """One step of both, by gradients."""
        self.backward(ids)
        for each in (self.model, self.reference):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            each.zero_grad()

    def gradient_deviation(self) -> dict[str, float]:
        """Of the parameter where it is largest; infinite if one lacks a gradient, and if no router has one."""
        wanted = {name: p.grad for name, p in self.reference.named_parameters()}
        worst, compared = largest(saved_gradients(self.model), wanted, wanted)
        routers = [name for name in compared if "gate" in name or "router" in name]
        return {f"gradient of {worst}": compared[worst] if routers and len(compared) > 5 else math.inf}

    def update_deviation(self, found: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Of weights, relative to how far the reference's have gone from where they were."""
        wanted = {name: p.detach() for name, p in self.reference.named_parameters()}
        gone = {name: wanted[name] - value for name, value in self.initial.items()}
        worst, compared = largest(found, wanted, gone)
        return {f"weights of {worst}": compared[worst]}


def as_saved(model: nn.Module, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Whole *tensors*, by names of the model's parameters, in the shapes that its files have."""
    shapes = saved_otherwise(model)
    found: dict[str, torch.Tensor | None] = {}
    for name, tensor in tensors.items():
        put_together = None if tensor is None else whole(tensor.detach())
        found[name] = shapes[name](put_together)[name] if put_together is not None and name in shapes else put_together
    return found


def saved_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Whole gradients by name, in the shapes of the files; those of weights that only files have are nothing."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    nothing = {name: None if gradient is None else torch.zeros_like(gradient) for name, gradient in gradients.items()}
    origin = as_saved(model, nothing)
    found = as_saved(model, gradients)
    return {name: None if value is None else value - origin[name] for name, value in found.items()}


def largest(
    found: Mapping[str, torch.Tensor | None],
    wanted: Mapping[str, torch.Tensor | None],
    scales: Mapping[str, torch.Tensor | None],
) -> tuple[str, dict[str, float]]:
    """The name of the largest deviation relative to what *scales* has, and all of them; infinite where one is absent.

    Names whose scale is nothing are left out.
    """
    deviations = {}
    for name, right in wanted.items():
        value, scale = found[name], scales[name]
        if value is None or right is None:
            if value is not right:
                deviations[name] = math.inf
        elif scale is not None and (size := scale.abs().max().item()) > NOTHING:
            assert value.shape == right.shape, (name, value.shape, right.shape)
            deviation = (value - right).abs().max().item() / size
            deviations[name] = deviation if math.isfinite(deviation) else math.inf
    return max(deviations, key=lambda name: deviations[name]), deviations


def in_files(reference: nn.Module, directory: str) -> None:
    """Leave it in the hub's files under *directory*, for all ranks."""
    if dist.get_rank() == 0:
        reference.save_pretrained(directory)
    dist.barrier()


def opened(name: str, door: Door, directory: str, fault: Fault | None = None) -> Pair:
    """The architecture *name*, through *door*."""
    reference = build(name)
    reference.config._experts_implementation = "eager"
    if door == "any model":
        model = hep.expert_parallelize(copy.deepcopy(reference), ep_mesh())
    else:
        in_files(reference, directory)
        model = inside_transformers(directory)
    return Pair(model, reference, door, fault)


def inside_transformers(
    directory: str,
    exchange: str = "hyperep",
    experts: str | None = hep.EXPERTS_IMPLEMENTATION,
    beside: Literal["fsdp_size", "tp_size"] = "fsdp_size",
) -> nn.Module:
    """As transformers loads it and shards the rest over the same ranks, with the *exchange* and *experts* of a name."""
    ranks = dist.get_world_size()
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation=experts,
        distributed_config=DistributedConfig(**{beside: ranks}, ep_size=ranks, ep_implementation=exchange),
    ).eval()
