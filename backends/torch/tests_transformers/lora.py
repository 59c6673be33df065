# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft on experts' own weights: beyond the matrix, orders, steps, merging, FSDP2, experts of one's own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import hyperep_torch
import hyperep_torch.transformers as hep
import own_experts
import peft
import torch
import torch.distributed as dist
from architectures import build
from doors import averaged, batch, ep_mesh, relative, whole
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

TOLERANCE = 1e-5


def with_lora_on_experts(platform: Any, name: str, order: str, directory: str) -> None:
    """Adapters on the experts' own weights, before and after these are spread: all gradients, three steps, the file."""
    wanted = _adapted(build(name))
    model = copy.deepcopy(wanted)
    if order != "after":
        hep.expert_parallelize(model, ep_mesh())
    else:
        model = hep.expert_parallelize(build(name), ep_mesh())
        # Other values on each rank: all get those of the first.
        model = hyperep_torch.shard_adapters(_adapted(model, seed=platform.rank))
        hyperep_torch.shard_adapters(model)
    if order == "base trained":
        for adapted in (model, wanted):
            adapted.requires_grad_(True)
    ids = batch(platform.rank)
    files = {who: f"{directory}/{who}" for who in ("whole", "spread")}
    hep.save_pretrained(model, files["spread"])
    if platform.rank == 0:
        wanted.save_pretrained(files["whole"])
    dist.barrier()
    read = {who: load_file(f"{path}/adapter_model.safetensors") for who, path in files.items()}
    assert read["spread"].keys() == read["whole"].keys()
    assert any("experts" in key for key in read["whole"])
    for key, value in read["whole"].items():
        assert torch.equal(read["spread"][key], value), key
    back = peft.PeftModel.from_pretrained(build(name), files["spread"])
    assert relative(back(input_ids=ids).logits, wanted(input_ids=ids).logits) < TOLERANCE
    # Read from the file, and the experts spread afterwards; and read for experts that are spread already.
    hep.expert_parallelize(back, ep_mesh())
    late = peft.PeftModel.from_pretrained(hep.expert_parallelize(build(name), ep_mesh()), files["spread"])
    for loaded in (back, hyperep_torch.shard_adapters(late)):
        assert relative(loaded(input_ids=ids).logits, wanted(input_ids=ids).logits) < TOLERANCE
    with model.disable_adapter(), wanted.disable_adapter():
        assert relative(model(input_ids=ids).logits, wanted(input_ids=ids).logits) < TOLERANCE
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any("lora" in key for key, _ in merged.named_parameters())
    assert relative(merged(input_ids=ids).logits, wanted(input_ids=ids).logits) < TOLERANCE
    optimizers = [
        # Not so small an epsilon that gradients which are nothing but noise become steps.
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, foreach=False)
        for m in (model, wanted)
    ]
    for number in range(3):
        tolerance = TOLERANCE if number == 0 else 1e-3
        out, expected = model(input_ids=ids, labels=ids), wanted(input_ids=ids, labels=ids)
        assert relative(out.logits, expected.logits) < tolerance
        out.loss.backward()
        expected.loss.backward()
        on_experts = 0
        for key, found, right in _pairs(model, wanted):
            assert (found.grad is None) == (right.grad is None) == (not right.requires_grad), key
            if right.grad is not None:
                right.grad = averaged(right.grad)
                if isinstance(found.grad, DTensor):
                    on_experts += 1
                    assert relative(whole(found.grad), right.grad) < tolerance, key
                else:
                    found.grad = averaged(found.grad)
        assert on_experts >= 8
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for key, found, right in _pairs(model, wanted):
        torch.testing.assert_close(whole(found.detach()), right.detach(), rtol=1e-3, atol=1e-3, msg=key)


class Block(nn.Module):
    """An engineer's own experts, where peft finds them; it asks them which layout their weights have."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = own_experts.Written(transposed=transposed)
        self.experts.is_transposed = transposed

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What they compute."""
        return self.experts(*inputs)


def with_lora_under_fully_shard(platform: Any) -> None:
    """Adapters that are spread over ep, and then over efsdp: each gradient is the mean over all data ranks."""
    config = peft.LoraConfig(
        r=3, target_modules=[], target_parameters=["experts.gate_up", "experts.down"], init_lora_weights=False
    )
    for shape in ((1, 2), (2, 1)):
        torch.manual_seed(0)
        wanted = peft.get_peft_model(Block(False).double(), config)
        model = copy.deepcopy(wanted)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))
        hyperep_torch.ExpertParallel().apply(model.base_model.model.experts, mesh["ep"])
        hyperep_torch.fully_shard(model, mesh)
        for rank in range(platform.world_size):
            own_experts.gradients(wanted, "rows", rank)
        own_experts.gradients(model, "rows", platform.rank)
        for name, found, right in _pairs(model, wanted):
            assert (found.grad is None) == (right.grad is None) == ("lora_" not in name), name
            if right.grad is not None:
                mean = right.grad / platform.world_size
                torch.testing.assert_close(found.grad.full_tensor(), mean, rtol=1e-9, atol=1e-9, msg=name)


def with_lora_on_own_experts(platform: Any, frozen: bool) -> None:
    """Under a style, before and after it, in both layouts and calls: outputs and gradients of the whole module."""
    ranks, mesh = platform.world_size, ep_mesh()
    config = peft.LoraConfig(
        r=3, target_modules=[], target_parameters=["experts.gate_up", "experts.down"], init_lora_weights=False
    )
    for order, transposed, call in itertools.product(("before", "after"), (False, True), ("rows", "tokens")):
        torch.manual_seed(0)
        plain = Block(transposed).double()
        wanted = peft.get_peft_model(copy.deepcopy(plain), config)
        model = copy.deepcopy(wanted)
        if order == "after":
            hyperep_torch.ExpertParallel().apply(plain.experts, mesh)
            model = peft.get_peft_model(plain, config)  # which draws other adapters
            given = {name: p.detach() for name, p in wanted.named_parameters() if "lora_" in name}
            assert not model.load_state_dict(given, strict=False).unexpected_keys
            hyperep_torch.shard_adapters(model)
        experts = [m.base_model.model.experts for m in (model, wanted)]
        if order == "before":
            hyperep_torch.ExpertParallel().apply(experts[0], mesh)
        for m in (model, wanted):
            m.requires_grad_(True)
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(not frozen or "lora_" in name)
        results = [own_experts.gradients(experts[1], call, rank) for rank in range(ranks)]
        own_experts.agree(own_experts.gradients(experts[0], call, platform.rank), results[platform.rank], order)
        for name, found, right in _pairs(model, wanted):
            assert (found.grad is None) == (right.grad is None) == (frozen and "lora_" not in name), name
            if right.grad is not None:
                assert right.grad.abs().max() > 0.01, name
                own_experts.agree([found.grad], [right.grad], f"{name}, {order}")


def _pairs(model: nn.Module, wanted: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Parameters of the same name; a call of peft's wrapper changes their order."""
    others = dict(wanted.named_parameters())
    assert len(others) == sum(1 for _ in model.parameters())
    return ((key, parameter, others[key]) for key, parameter in model.named_parameters())


def _adapted(model: nn.Module, seed: int = 0) -> Any:
    """With adapters on attention and on both weights of the experts, none of which is zero."""
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                # Nobody spreads attention's, and they start alike.
                own = generator if "experts" in name else torch.Generator().manual_seed(len(name))
                parameter.normal_(std=0.2, generator=own)
    return adapted
