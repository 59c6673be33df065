# SPDX-License-Identifier: Apache-2.0
"""What each rank does: a stock model whole and one whose experts are spread, on data that differ from rank to rank."""

from __future__ import annotations

import copy
from typing import Any

import hyperep_torch
import hyperep_torch.transformers as hep
import peft
import pytest
import torch
from architectures import VOCABULARY, build
from checks import trainer
from doors import (
    Pair,
    average_gradients,
    averaged,
    batch,
    ep_mesh,
    in_files,
    inside_transformers,
    relative,
    whole,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

TOLERANCE = 1e-5


def refused_before_reading(platform: Any, name: str, directory: str) -> None:
    """Experts that are kept in another shape than in the files."""
    in_files(build(name), directory)
    with pytest.raises(ValueError, match="in another shape than its files"):
        hep.from_pretrained(AutoModelForCausalLM, directory, ep_mesh())


def step(platform: Any, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on this rank's batch; replicated gradients are averaged by hand."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(10 * seed + platform.rank % 2))
    model(input_ids=ids, labels=ids).loss.backward()
    average_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


def trained(platform: Any, name: str, directory: str) -> None:
    """Two steps, and a checkpoint of weights and moments."""
    model, optimizer = _model_and_optimizer(name, ep_mesh())
    for number in range(2):
        step(platform, model, optimizer, number)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=directory)


def resumed(platform: Any, name: str, directory: str, further: str) -> None:
    """At whatever number of ranks, two steps more from a checkpoint; rank 0 leaves the whole weights."""
    model, optimizer = _model_and_optimizer(name, ep_mesh(), seed=5)
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for number in range(2, 4):
        step(platform, model, optimizer, number)
    state = hep.full_state_dict(model)
    if platform.rank == 0:
        torch.save(state, further)


def _model_and_optimizer(name: str, mesh: Any, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(name, seed=seed)
    hep.expert_parallelize(model, mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def fully_sharded(platform: Any, name: str) -> None:
    """hyperep's FSDP2 arrangement around a stock model: experts over ep and efsdp, everything else over both."""
    ranks = platform.world_size
    reference = build(name)
    reference.config._experts_implementation = "eager"
    model = copy.deepcopy(reference)
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("efsdp", "ep"))
    hep.expert_parallelize(model, mesh["ep"], gradients="sum")
    hyperep_torch.fully_shard(model, mesh, blocks="model.layers.*")
    # FSDP2 reduces here too.
    pair = Pair(model, reference, "inside transformers", None)
    pair.backward(batch(platform.rank))
    assert max(pair.gradient_deviation().values()) < TOLERANCE

    # Also where what is called is peft's wrapper around the experts.
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    for whole_model in (build(name), peft.get_peft_model(build(name), lora)):
        divided = hep.expert_parallelize(whole_model, mesh["ep"])
        with pytest.raises(ValueError, match=r"divides the gradients of experts itself.*gradients='sum'"):
            hyperep_torch.fully_shard(divided, mesh)


def balanced_globally(platform: Any, name: str, padded: bool) -> None:
    """The loss and its gradients are transformers' own over one batch of all ranks' tokens, which differ in number."""
    ranks, mesh = platform.world_size, ep_mesh()
    reference = build(name)
    reference.config._experts_implementation = "eager"
    reference.config.router_aux_loss_coef = 0.0
    model = hep.expert_parallelize(copy.deepcopy(reference), mesh)
    top_k, num_experts = reference.config.num_experts_per_tok, 8
    batches = [batch(rank) for rank in range(ranks)]
    masks = [torch.ones_like(ids) for ids in batches]
    if padded:
        for rank, mask in enumerate(masks):
            mask[1, : 3 + 2 * rank] = 0

    def routed(of: nn.Module, rank: int) -> Any:
        return of(input_ids=batches[rank], attention_mask=masks[rank], output_router_logits=True).router_logits

    given = {"attention_mask": masks[platform.rank]} if padded else {}
    part = hep.global_balance_loss(routed(model, platform.rank), mesh, top_k=top_k, **given)
    part.backward()

    every = [routed(reference, rank) for rank in range(ranks)]
    together = tuple(torch.cat(layer) for layer in zip(*every, strict=True))
    mask = torch.cat([m.flatten() for m in masks]) if padded else None
    wanted = load_balancing_loss_func(together, num_experts, top_k, mask)
    wanted.backward()
    assert relative(averaged(part)[None], wanted.detach()[None]) < TOLERANCE
    own = load_balancing_loss_func(every[platform.rank], num_experts, top_k, masks[platform.rank] if padded else None)
    assert relative(own.detach()[None], wanted.detach()[None]) > 1e-3, "the data do not tell one loss from the other"
    compared = 0
    for (key, found), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if expected.grad is None or expected.grad.abs().max() < 1e-7:
            continue
        got = whole(found.grad) if isinstance(found, DTensor) else averaged(found.grad)
        assert relative(got, expected.grad) < TOLERANCE, (key, relative(got, expected.grad))
        compared += "gate" in key
    assert compared, "no router among the parameters that were compared"


def whole_state(platform: Any, name: str) -> None:
    """On rank 0, in the shapes of the whole model; on others nothing."""
    reference = build(name)
    state = hep.full_state_dict(hep.expert_parallelize(copy.deepcopy(reference), ep_mesh()))
    assert bool(state) == (platform.rank == 0)
    if state:
        assert state.keys() == reference.state_dict().keys()
        for key, value in reference.state_dict().items():
            assert torch.equal(state[key], value), key


def tied(platform: Any, name: str, directory: str) -> dict[str, list[float]]:
    """How far logits are from the whole model's, of a model whose head is its embedding, at each of two steps."""
    reference = build(name, tie_word_embeddings=True)
    in_files(reference, directory)
    models = {"any model": hep.expert_parallelize(copy.deepcopy(reference), ep_mesh())}
    for exchange in ("hyperep", "all_to_all"):
        models[exchange] = inside_transformers(directory, exchange, experts=None)
    found: dict[str, list[float]] = {}
    for who, model in models.items():
        pair = Pair(model, copy.deepcopy(reference), "any model" if who == "any model" else "inside transformers", None)
        for _ in range(2):
            out, expected = pair.backward(batch(platform.rank))
            found.setdefault(who, []).append(relative(whole(out.logits.detach()), expected.logits.detach()))
            for each in (pair.model, pair.reference):
                torch.optim.SGD(each.parameters(), lr=0.1).step()
    return found


def trained_otherwise(platform: Any, name: str, settings: dict[str, Any], directory: str) -> dict[str, float]:
    """By the Trainer with other settings than the matrix has."""
    return trainer(platform, name, "any model", directory, **settings)


def not_divisible(platform: Any) -> None:
    """Refused with the name and the rule, before anything is changed."""
    model = build("qwen3_moe", num_experts=7, num_local_experts=7)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' has 7 experts, which 2 ranks do not divide"):
        hep.expert_parallelize(model, ep_mesh())
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"gradients='average': choose 'mean' or 'sum'"):
        hep.expert_parallelize(model, ep_mesh(), gradients="average")


def shared_batch(platform: Any, name: str, directory: str) -> None:
    """The first door where tensor parallelism splits the rest: all ranks have one batch, and each sends its part."""
    reference = build(name)
    in_files(reference, directory)
    model = inside_transformers(directory, beside="tp_size")
    ids = batch(0, tokens=11)  # 22 tokens, of which no rank's part is a whole sequence
    out, expected = model(input_ids=ids, labels=ids), reference(input_ids=ids, labels=ids)
    assert relative(whole(out.logits), expected.logits) < TOLERANCE
    out.loss.backward()
    expected.loss.backward()
    compared = 0
    for (key, found), (_, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if found.grad is not None and wanted.grad.abs().max() > 1e-7:
            assert relative(whole(found.grad), wanted.grad) < TOLERANCE, key
            compared += "experts" in key or "mlp.gate" in key
    assert compared == 6


def graph_breaks(platform: Any, directory: str) -> tuple[int, int, int]:
    """Of a Mixtral of two layers: transformers' own exchange, hyperep's in its place, and ``expert_parallelize``."""
    whole_model = build("mixtral")
    in_files(whole_model, directory)
    ranks = platform.world_size
    models = [
        AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=name),
        )
        for name in ("all_to_all", "hyperep")
    ]
    models.append(hep.expert_parallelize(whole_model, ep_mesh()))
    ids = batch(0)
    found = []
    for model in models:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(lambda ids, model=model: model(input_ids=ids, use_cache=False).logits)(ids)
        found.append(explained.graph_break_count)
    return tuple(found)
