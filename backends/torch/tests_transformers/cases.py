# SPDX-License-Identifier: Apache-2.0
"""What each rank does: a stock model whole and one whose experts are spread, on data that differ from rank to rank."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import hyperep_torch
import hyperep_torch.transformers as hep
import own_experts
import peft
import pytest
import torch
import torch.distributed as dist
from architectures import VOCABULARY, build
from hyperep_torch.transformers.find import find_experts
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, modeling_utils
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

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
        if got.shape != expected.shape:  # DBRX's experts have a dim of their own, LongCat's zero experts no weight
            got = got.flatten(0, 1) if got.ndim > expected.ndim else got
            assert not expected[len(got) :].any(), name
            expected = expected[: len(got)]
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
        assert 0 < load.tokens_per_expert.sum().item() <= 2 * choices
        assert load.tokens_per_expert.sum().item() % choices == 0 or name == "longcat_flash"


def in_files(platform: Any, name: str, directory: str) -> nn.Module:
    """The whole model, computed by its own forward, which lies in the hub's files under *directory* too."""
    reference = build(name)
    reference.config._experts_implementation = "eager"
    if platform.rank == 0:
        reference.save_pretrained(directory)
    dist.barrier()
    return reference


def through_transformers(platform: Any, name: str, directory: str) -> None:
    """The first door: transformers loads, shards and saves, and hyperep exchanges; with FSDP2 over the same ranks."""
    reference = in_files(platform, name, directory)
    ranks = platform.world_size
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation=hep.EXPERTS_IMPLEMENTATION,
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="hyperep"),
    ).eval()
    ids = batch(platform.rank)
    out, expected = model(input_ids=ids, labels=ids), reference(input_ids=ids, labels=ids)
    assert relative(whole(out.logits), expected.logits) < TOLERANCE
    out.loss.backward()
    expected.loss.backward()
    require_same_gradients(model, reference, reduced=True)
    with hep.load_report(model) as loads:
        model(input_ids=ids)
    assert [load.tokens_per_expert.sum().item() > 0 for load in loads] == [True] * len(loads)


def recomputed(platform: Any, name: str, reentrant: bool) -> None:
    """With gradient checkpointing, of either kind, the gradients are the same."""
    reference = build(name).train()
    reference.config._experts_implementation = "eager"
    model = copy.deepcopy(reference)
    hep.expert_parallelize(model, ep_mesh())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = batch(platform.rank)
    with counted_calls(model) as calls:
        model(input_ids=ids, labels=ids).loss.backward()
    assert calls == [2] * len(calls), "nothing was computed again"
    reference(input_ids=ids, labels=ids).loss.backward()
    require_same_gradients(model, reference)


@contextlib.contextmanager
def counted_calls(model: nn.Module) -> Iterator[list[int]]:
    """How often each layer of experts is called."""
    calls: list[int] = []
    handles = []
    for number, layer in enumerate(find_experts(model)):
        calls.append(0)

        def count(module: nn.Module, inputs: Any, number: int = number) -> None:
            calls[number] += 1

        handles.append(layer.module.register_forward_pre_hook(count))
    yield calls
    for handle in handles:
        handle.remove()


def generated(platform: Any, name: str) -> None:
    """Greedy tokens, from prompts of different lengths, of which one ends earlier, are those of the whole model."""
    reference = build(name)
    model = copy.deepcopy(reference)
    hep.expert_parallelize(model, ep_mesh())
    prompt = batch(platform.rank, tokens=4 + 3 * platform.rank)
    new = 5 + 2 * platform.rank
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        found = model.generate(prompt, synced_gpus=True, **settings)
        expected = reference.generate(prompt, **settings)
    assert found.shape == (2, prompt.shape[1] + new)
    assert torch.equal(found, expected)


class _Pieces:
    """A file of safetensors that adds up how many numbers are read from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = safe_open(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> Any:
        return _Piece(self.file.get_slice(name))


class _Piece:
    read = 0

    def __init__(self, piece: Any) -> None:
        self.piece = piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self.piece, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self.piece[index]
        _Piece.read += found.numel()
        return found


def read_by_owners(platform: Any, name: str, directory: str) -> None:
    """Each rank reads the whole of what is not experts, and of those its own; and trains as the whole model."""
    reference = in_files(platform, name, directory)
    _Piece.read = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "safe_open", _Pieces)
        model = hep.from_pretrained(AutoModelForCausalLM, directory, ep_mesh(), dtype=torch.float32)
    assert type(model) is type(reference)
    for (key, found), (other, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(whole(found.detach()), wanted), key
    for (key, found), (other, wanted) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert key == other
        assert torch.equal(found, wanted), key
    sharded = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    assert sharded > 10_000
    ranks = platform.world_size
    numbers = sum(value.numel() for value in dict(reference.state_dict(keep_vars=True)).values())
    assert _Piece.read == numbers - sharded + sharded // ranks
    ids = batch(platform.rank)
    for each in (model.train(), reference.train()):
        each(input_ids=ids, labels=ids).loss.backward()
    require_same_gradients(model, reference)


def refused_before_reading(platform: Any, name: str, directory: str) -> None:
    """Experts that are kept in another shape than in the files."""
    in_files(platform, name, directory)
    with pytest.raises(ValueError, match="in another shape than its files"):
        hep.from_pretrained(AutoModelForCausalLM, directory, ep_mesh())


def saved_and_loaded(platform: Any, name: str, directory: str) -> None:
    """What is saved is what stock transformers loads, to the bit; after a step too, and through a checkpoint."""
    reference = build(name)
    model = copy.deepcopy(reference)
    hep.expert_parallelize(model, ep_mesh())
    hep.save_pretrained(model, directory)
    require_equal(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), reference)
    state = hep.full_state_dict(model)
    assert bool(state) == (platform.rank == 0)
    if state:
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in reference.state_dict().items()
        }


def require_equal(model: nn.Module, reference: nn.Module) -> None:
    """Each parameter, to the bit."""
    for (name, found), (other, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(whole(found.detach()), wanted.detach()), name


def step(platform: Any, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on this rank's batch; replicated gradients are averaged by hand."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(10 * seed + platform.rank % 2))
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            parameter.grad.copy_(averaged(parameter.grad))
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
    ids = batch(platform.rank)
    model(input_ids=ids, labels=ids).loss.backward()
    reference(input_ids=ids, labels=ids).loss.backward()
    require_same_gradients(model, reference, reduced=True)

    divided = hep.expert_parallelize(copy.deepcopy(build(name)), mesh["ep"])
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


def with_lora(platform: Any, name: str, directory: str) -> None:
    """Adapters on attention and router; the base frozen, its experts spread. The adapters' gradients, and the file."""
    wanted = peft.get_peft_model(build(name), _lora(name))
    for parameter_name, parameter in wanted.named_parameters():
        if "lora_B" in parameter_name:
            with torch.no_grad():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter_name)))
    model = copy.deepcopy(wanted)
    hep.expert_parallelize(model, ep_mesh())
    ids = batch(platform.rank)
    out, expected = model(input_ids=ids, labels=ids), wanted(input_ids=ids, labels=ids)
    assert relative(out.logits, expected.logits) < TOLERANCE
    out.loss.backward()
    expected.loss.backward()
    trained_ones = 0
    for (key, found), (_, right) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert (found.grad is None) == (right.grad is None), key
        if right.grad is not None:
            trained_ones += 1
            assert relative(averaged(found.grad), averaged(right.grad)) < TOLERANCE, key
    assert trained_ones > 4
    if platform.rank == 0:
        model.save_pretrained(directory)
    dist.barrier()
    back = peft.PeftModel.from_pretrained(build(name), directory)
    assert torch.equal(back(input_ids=ids).logits, wanted(input_ids=ids).logits)


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


def _lora(name: str) -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def by_trainer(platform: Any, name: str, directory: str, spread: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own Trainer makes of the model in a few steps, whole or spread; under DDP in both cases."""
    model = build(name).train()
    if spread:
        hep.expert_parallelize(model, ep_mesh())
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (12,), generator=generator) for _ in range(24)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=2,
            max_steps=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **settings,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()
    weights = {key: whole(value.detach()).float().clone() for key, value in model.named_parameters()}
    for key, value in weights.items():
        others = [torch.empty_like(value) for _ in range(platform.world_size)]
        dist.all_gather(others, value)
        assert all(torch.equal(other, value) for other in others), f"{key} is not the same on all ranks"
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "weights": {key: value.numpy() for key, value in weights.items()},
        "losses": [entry["loss"] for entry in history],
        "norms": [float(entry["grad_norm"]) for entry in history],
    }


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
    reference = in_files(platform, name, directory)
    ranks = platform.world_size
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation=hep.EXPERTS_IMPLEMENTATION,
        distributed_config=DistributedConfig(tp_size=ranks, ep_size=ranks, ep_implementation="hyperep"),
    ).eval()
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
    if platform.rank == 0:
        whole_model.save_pretrained(directory)
    dist.barrier()
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
