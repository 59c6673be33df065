# SPDX-License-Identifier: Apache-2.0
"""What is checked of every architecture, through either door: each returns how far the model is from the whole one.

Checks of something that needs no gradient come after a training step, so that what is wrong with gradients spoils them
too.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hyperep_torch.transformers as hep
import peft
import torch
import torch.distributed as dist
from architectures import VOCABULARY, build
from doors import (
    Door,
    Pair,
    as_saved,
    batch,
    ep_mesh,
    in_files,
    inside_transformers,
    largest,
    opened,
    relative,
    saved_gradients,
    whole,
)
from faults import ROUTERS, Fault
from hyperep_torch.transformers.find import find_experts
from pieces import numbers_read
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

ATTENTION = ("attn", "attention", "mixer.q_proj", "mixer.in_proj")
"""What is part of their paths."""


class Lacking(Exception):
    """What is to be checked is not there, whoever's limit that is."""


def gradients(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """Logits, loss, every gradient; and how many tokens each expert got."""
    pair = opened(name, door, directory, fault)
    with hep.load_report(pair.model) as loads:
        out, expected = pair.backward(batch(platform.rank))
    tokens = sum(batch(rank).numel() for rank in range(platform.world_size))
    # Of LongCat's choices some are of no expert.
    shares = [(load.tokens_per_expert.numel(), load.tokens_per_expert.sum().item() / tokens) for load in loads]
    counted = all(n == 8 and 0 < k <= 4 and (k == round(k) or name == "longcat_flash") for n, k in shares)
    found = {"loads": 0.0 if counted and loads else math.inf}
    return {**found, **_outputs(out, expected), **pair.gradient_deviation()}


def auxiliary_loss(
    platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None
) -> dict[str, float]:
    """The loss by which routers are balanced, where transformers has one, and every gradient of it and the other."""
    pair = opened(name, door, directory, fault)
    ids = batch(platform.rank)
    if getattr(pair.reference(input_ids=ids, labels=ids, output_router_logits=True), "aux_loss", None) is None:
        raise Lacking("transformers computes no auxiliary loss")
    out, expected = pair.backward(ids, output_router_logits=True)
    plain = pair.reference(input_ids=ids, labels=ids, output_router_logits=False)
    assert abs(expected.loss - plain.loss) > 1e-4, "the auxiliary loss does not count"
    found = {"auxiliary loss": relative(whole(out.aux_loss.detach())[None], expected.aux_loss.detach()[None])}
    return {**found, **_outputs(out, expected), **pair.gradient_deviation()}


def checkpointing(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """Gradients where the forward of layers is computed again, by both kinds."""
    pair = opened(name, door, directory, fault)
    found: dict[str, float] = {}
    for each in (pair.model, pair.reference):
        each.train()
    for reentrant in (False, True):
        pair.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with _counted_calls(pair.model) as calls:
            pair.backward(batch(platform.rank))
        again = calls == [2] * len(calls)
        found |= {f"reentrant={reentrant}, {k}": v if again else math.inf for k, v in pair.gradient_deviation().items()}
        pair.model.gradient_checkpointing_disable()
    return found


def generation(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """Greedy tokens after a step, and their logits, from prompts of different lengths, of which one ends earlier."""
    pair = opened(name, door, directory, fault)
    pair.step(batch(platform.rank))
    prompt = batch(platform.rank, tokens=4 + 3 * platform.rank)
    new = 5 + 2 * platform.rank
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = pair.model.generate(prompt, synced_gpus=True, **settings)
        expected = pair.reference.generate(prompt, **settings)
    assert expected.sequences.shape == (2, prompt.shape[1] + new)
    same = torch.equal(found.sequences, expected.sequences)
    return {"logits": relative(torch.stack(found.logits), torch.stack(expected.logits)) if same else math.inf}


def files(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """What is saved after a step is what the model has, to the bit, and stock transformers reads it."""
    pair = opened(name, door, f"{directory}/before", fault)
    pair.step(batch(platform.rank))
    after = f"{directory}/after"
    if door == "any model":
        hep.save_pretrained(pair.model, after)
    else:
        pair.model.save_pretrained(after)
    dist.barrier()
    read = {
        key: p.detach()
        for key, p in AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32).named_parameters()
    }
    held = as_saved(pair.model, dict(pair.model.named_parameters()))
    # Rank 0 writes; where nobody reduced, others have other weights.
    bits = all(torch.equal(read[key], value) for key, value in held.items()) or platform.rank != 0
    return {"not equal to the bit": 0.0 if bits else math.inf, **pair.update_deviation(read)}


def reading(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """From files each rank reads what is not experts, and its own of these; weights to the bit, and every gradient."""
    reference = build(name)
    reference.config._experts_implementation = "eager"
    in_files(reference, directory)
    with numbers_read() as count:
        model = hep.from_pretrained(AutoModelForCausalLM, directory, ep_mesh(), dtype=torch.float32)
    held = as_saved(model, dict(model.named_parameters()))
    bits = all(torch.equal(held[key], p.detach()) for key, p in reference.named_parameters())
    bits = bits and all(torch.equal(model.get_buffer(key), b) for key, b in reference.named_buffers())
    sharded = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    stored = sum(math.prod(size) for size in _stored(directory).values())
    right = count() == stored - sharded + sharded // platform.world_size
    pair = Pair(model.eval(), reference, door, fault)
    out, expected = pair.backward(batch(platform.rank))
    found = {"not equal to the bit": 0.0 if bits else math.inf, "numbers read": 0.0 if right else math.inf}
    return {**found, **_outputs(out, expected), **pair.gradient_deviation()}


def trainer(
    platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None, **settings: Any
) -> dict[str, float]:
    """Losses, norms and weights of three steps by transformers' Trainer, with clipping and accumulation."""
    pair = opened(name, door, f"{directory}/model", fault)
    found = _trained(pair.model.train(), directory, fault, settings)
    wanted = _trained(pair.reference.train(), directory, None, settings)
    told = {what: max(abs(a - b) / abs(b) for a, b in zip(found[what], wanted[what], strict=True)) for what in found}
    weights = as_saved(pair.model, dict(pair.model.named_parameters()))
    same = fault is not None or all(_same_on_all_ranks(value) for value in weights.values())
    return {"not the same on all ranks": 0.0 if same else math.inf, **told, **pair.update_deviation(weights)}


def adapters(platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None) -> dict[str, float]:
    """LoRA on attention and on the router, beside a frozen base: gradients, and peft's own file."""
    reference = build(name)
    modules, parameters = _attention(reference), []
    for path, module in reference.named_modules():
        parent = path.rpartition(".")[0]
        if path.rpartition(".")[2] in ROUTERS or parent.rpartition(".")[2] in ROUTERS:
            if type(module) is nn.Linear:
                modules.append(path)
            elif path.rpartition(".")[2] in ROUTERS:
                parameters += [f"{path}.{key}" for key, p in module.named_parameters(recurse=False) if p.ndim == 2]
    config = peft.LoraConfig(r=4, target_modules=modules, target_parameters=parameters or None, init_lora_weights=False)
    return _adapted(platform, reference, config, door, directory, fault)


def adapters_of_experts(
    platform: Any, name: str, door: Door, directory: str, fault: Fault | None = None
) -> dict[str, float]:
    """LoRA on the experts' own weights: gradients, and peft's own file."""
    reference = build(name)
    parameters = [(f"{e.path}.{key}", p) for e in find_experts(reference) for key, p in e.module.named_parameters()]
    weights = [path for path, p in parameters if p.ndim == 3]
    if not weights:
        raise Lacking("weights without a dim for the expert, of which peft cannot know what it is")
    config = peft.LoraConfig(
        r=3, target_modules=_attention(reference), target_parameters=weights, init_lora_weights=False
    )
    return _adapted(platform, reference, config, door, directory, fault)


CHECKS = {
    "logits, loss, gradients": gradients,
    "auxiliary loss": auxiliary_loss,
    "checkpointing": checkpointing,
    "generate": generation,
    "save": files,
    "read by owners": reading,
    "Trainer": trainer,
    "LoRA": adapters,
    "LoRA on experts": adapters_of_experts,
}


def checked(
    platform: Any, check: str, name: str, door: Door, directory: str, fault: Fault | None = None
) -> dict[str, float] | str:
    """What the check finds, or the limit that stands in its way, on all ranks alike."""
    try:
        return CHECKS[check](platform, name, door, directory, fault)
    except (Lacking, ValueError, RuntimeError) as limit:
        return f"{type(limit).__name__}: {limit}"


def _outputs(out: Any, expected: Any) -> dict[str, float]:
    return {
        "logits": relative(whole(out.logits.detach()), expected.logits.detach()),
        "loss": abs(out.loss.item() - expected.loss.item()) / abs(expected.loss.item()),
    }


def _attention(model: nn.Module) -> list[str]:
    """The linear maps of attention, or of what a layer has in its place."""
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    # afmoe calls a gate of its attention what peft takes for a part of experts.
    return [path for path in linear if any(part in path for part in ATTENTION) and not path.endswith("gate_proj")]


def _stored(directory: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(v.shape) for path in Path(directory).glob("*.safetensors") for key, v in load_file(path).items()}


@contextlib.contextmanager
def _counted_calls(model: nn.Module) -> Iterator[list[int]]:
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


class _NoReduction(TrainerCallback):
    """DDP that keeps the gradients of its own rank."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first forward."""
        wrapped = self.trainer.model_wrapped
        if self.trainer.state.global_step == 0 and isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, _own)


def _own(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and not as text
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _same_on_all_ranks(value: torch.Tensor) -> bool:
    others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(others, value.contiguous())
    return all(torch.equal(other, value) for other in others)


def _trained(model: nn.Module, directory: str, fault: Fault | None, changed: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and norms of three steps, after which the model is what they made of it."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (12,), generator=generator) for _ in range(24)]
    settings: dict[str, Any] = {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.5},
        # A step must be large beside the rounding of weights.
        **{"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"},
        **{
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
        },
    }
    callback = _NoReduction()
    callbacks = [callback] if fault == "reduction left out" else []
    arguments = TrainingArguments(output_dir=directory, **{**settings, **changed})
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=callbacks
    )
    callback.trainer = trainer
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"losses": [entry["loss"] for entry in history], "norms": [float(entry["grad_norm"]) for entry in history]}


def _adapted(
    platform: Any, base: nn.Module, config: Any, door: Door, directory: str, fault: Fault | None
) -> dict[str, float]:
    """Adapters, with the base frozen: their gradients, the logits, and the file beside that of the whole model."""
    base.config._experts_implementation = "eager"
    torch.manual_seed(0)
    if door == "any model":
        reference = peft.get_peft_model(base, config)
        model = hep.expert_parallelize(copy.deepcopy(reference), ep_mesh())
    else:
        in_files(base, f"{directory}/base")
        model = peft.get_peft_model(inside_transformers(f"{directory}/base"), copy.deepcopy(config))
        reference = peft.get_peft_model(base, config)
        given = {key: p.detach() for key, p in reference.named_parameters() if "lora_" in key}
        assert not model.load_state_dict(given, strict=False).unexpected_keys
    pair = Pair(model, reference, "any model", fault)  # nobody else averages the adapters' gradients
    out, expected = pair.backward(batch(platform.rank))
    wanted = {key: p.grad for key, p in reference.named_parameters()}
    worst, compared = largest(saved_gradients(model), wanted, wanted)
    assert all("lora_" in key for key in compared)
    if door == "any model":
        hep.save_pretrained(model, f"{directory}/spread")
    else:  # gathers on all ranks
        model.save_pretrained(f"{directory}/spread", is_main_process=platform.rank == 0)
    if platform.rank == 0:
        reference.save_pretrained(f"{directory}/whole")
    dist.barrier()
    written, right = (load_file(f"{directory}/{which}/adapter_model.safetensors") for which in ("spread", "whole"))
    same = written.keys() == right.keys() and all(torch.equal(written[key], value) for key, value in right.items())
    told = {"file": 0.0 if same else math.inf, "none": 0.0 if len(compared) > 3 else math.inf}
    return {**told, f"gradient of {worst}": compared[worst], **_outputs(out, expected)}
