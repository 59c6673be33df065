# SPDX-License-Identifier: Apache-2.0
"""A stock Qwen3-MoE under transformers' expert parallelism: its own all-to-all beside hyperep's exchange of tokens.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/huggingface.py

Both are loaded by ``from_pretrained`` with a ``DistributedConfig``, and are FSDP2's over the same ranks. Gradients are
compared first. Then steps (forward and backward) take turns, so that other work on the machine disturbs both alike;
what counts is the ratio of the medians. The floor is the same model whose layers of experts do what none can do
without: raw exchanges of each token once there and back, its gradient too, and dense products of as many rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hyperep_torch.host_memory import keep_memory
from hyperep_torch.transformers import EXPERTS_IMPLEMENTATION
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, logging
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

WAYS = {
    # ep_implementation, experts_implementation
    "transformers": ("all_to_all", "grouped_mm"),
    "hyperep": ("hyperep", EXPERTS_IMPLEMENTATION),
    "floor": ("floor", EXPERTS_IMPLEMENTATION),
}


class Floor(EPImplementation):
    """Exchanges and products of a layer's sizes, on its own weights; what they are of is meaningless."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.sizes: tuple[list[int], list[int]] | None = None
        """Tokens to each rank, and from each."""

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """As experts are called; in every step on the same tokens."""
        if self.sizes is None:
            self.sizes, rows = self._counted(top_k_index)
            self.rows = hidden_states.new_ones(rows, hidden_states.shape[1])
        return _Raw.apply(hidden_states, self.experts.gate_up_proj, self.experts.down_proj, self)

    def _counted(self, indices: torch.Tensor) -> tuple[tuple[list[int], list[int]], int]:
        """The sizes, and how many rows this rank's experts have."""
        owners = indices // self.num_local_experts
        ranks = range(self.ep_mesh.size())
        told = torch.tensor([[(owners == rank).any(1).sum(), (owners == rank).sum()] for rank in ranks])
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=self.ep_mesh.get_group())
        return (told[:, 0].tolist(), heard[:, 0].tolist()), int(heard[:, 1].sum())

    def there_and_back(self, tokens: torch.Tensor) -> None:
        """Each token to the ranks of its experts, and as much back."""
        sent, received = self.sizes
        group, width = self.ep_mesh.get_group(), tokens.shape[1]
        copies, here = tokens.new_empty(sum(sent), width), tokens.new_empty(sum(received), width)
        dist.all_to_all_single(here, copies, received, sent, group)
        dist.all_to_all_single(copies, here, sent, received, group)


class _Raw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, floor: Floor) -> Any:
        floor.there_and_back(tokens)
        rows = floor.rows
        hidden = rows @ gate_up[0].T
        half = hidden[:, : down.shape[2]].contiguous()
        _ = half @ down[0].T
        ctx.floor = floor
        ctx.save_for_backward(rows, gate_up, down, hidden, half)
        return tokens.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, gate_up, down, hidden, half = ctx.saved_tensors
        ctx.floor.there_and_back(gradient)
        _ = rows @ down[0], rows.T @ half, hidden @ gate_up[0], hidden.T @ rows
        return gradient, torch.empty_like(gate_up), torch.empty_like(down), None


EPImplementationInterface.register("floor", Floor)


def settings() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256, help="of each expert")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where figures go")
    return parser.parse_args()


def load(directory: str, way: str) -> Any:
    """The model, sharded by transformers."""
    ranks = dist.get_world_size()
    exchange, experts = WAYS[way]
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation=experts,
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=exchange),
    )


def step(model: Any, ids: torch.Tensor) -> float:
    """Seconds for forward and backward."""
    model.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    dist.barrier()
    return time.perf_counter() - start


def main() -> None:
    """Check, measure, print."""
    args = settings()
    keep_memory()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = Qwen3MoeConfig(
        **{"vocab_size": 512, "hidden_size": args.dim, "intermediate_size": args.hidden},
        **{"moe_intermediate_size": args.hidden, "num_hidden_layers": args.layers, "head_dim": 32},
        **{"num_attention_heads": args.dim // 32, "num_key_value_heads": args.dim // 64},
        **{"num_experts": args.experts, "num_experts_per_tok": args.top_k},
    )
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if rank == 0:
            whole.save_pretrained(shared[0])
        dist.barrier()
        models = {way: load(shared[0], way) for way in WAYS}
        dist.barrier()
    ids = torch.randint(0, 512, (4, args.tokens // 4), generator=torch.Generator().manual_seed(rank))
    for model in models.values():
        step(model, ids)
    for (name, a), b in zip(models["hyperep"].named_parameters(), models["transformers"].parameters(), strict=True):
        found, wanted = a.grad.full_tensor(), b.grad.full_tensor()
        if (found - wanted).abs().max() > 1e-4 * wanted.abs().max():
            raise SystemExit(f"gradients of {name} differ: {(found - wanted).abs().max()} of {wanted.abs().max()}")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.repetitions):
        for way, model in models.items():
            times[way].append(1e3 * step(model, ids))
    medians = {way: statistics.median(found) for way, found in times.items()}
    figures = {
        **{f"{way}_ms": round(median, 2) for way, median in medians.items()},
        "ratio": round(medians["hyperep"] / medians["transformers"], 3),
        "floor_ratio": round(medians["floor"] / medians["transformers"], 3),
        "ranks": dist.get_world_size(),
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
    }
    if rank == 0:
        print(json.dumps(figures, indent=2))
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
