# SPDX-License-Identifier: Apache-2.0
"""Train a stock mixture-of-experts model of transformers, its experts spread over the ranks.

    torchrun --nproc-per-node 2 huggingface.py

A small random Qwen3-MoE learns a text, byte by byte: this file, unless another one is named. Two names are hyperep's.
Without torchrun the same model is trained on one rank: the same losses, for the same ``--batch``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import hyperep_torch as hep
import torch
import torch.distributed as dist
from hyperep_torch.transformers import expert_parallelize, load_report, save_pretrained
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch", type=int, default=8, help="sequences of all ranks together")
parser.add_argument("--context", type=int, default=64)
parser.add_argument("--text", type=Path, default=Path(__file__), help="a file to learn")
parser.add_argument("--save", type=Path, help="a directory for the model, as the hub has it")
args = parser.parse_args()

launched = dist.is_torchelastic_launched()
if launched:
    dist.init_process_group("gloo")
rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)

config = Qwen3MoeConfig(
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": args.context},
)
torch.manual_seed(0)  # the same weights on every rank
model = AutoModelForCausalLM.from_config(config)
if launched:
    expert_parallelize(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    wrapped = model
# Experts are DTensors, and everything else is not: a group for each.
experts = [p for name, p in model.named_parameters() if ".experts." in name]
others = [p for name, p in model.named_parameters() if ".experts." not in name]
optimizer = torch.optim.AdamW([{"params": experts}, {"params": others}], lr=3e-3)

data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
chosen = torch.Generator().manual_seed(0)
for step in range(args.steps):
    starts = torch.randint(len(data) - args.context, (args.batch,), generator=chosen).tensor_split(ranks)[rank]
    ids = torch.stack([data[start : start + args.context] for start in starts.tolist()])
    loss = wrapped(input_ids=ids, labels=ids).loss  # a mean over this rank's tokens
    loss.backward()
    hep.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / ranks
    if launched:
        dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step} loss {mean.item():.6f}", flush=True)

with load_report(model) as loads, torch.no_grad():
    model(input_ids=ids)
if rank == 0:
    for load in loads:
        print(f"{load.path}: busiest expert {load.imbalance:.2f} times the mean, {load.idle_experts} idle")
if args.save:
    save_pretrained(model, args.save)
if launched:
    dist.destroy_process_group()
