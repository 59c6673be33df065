# SPDX-License-Identifier: Apache-2.0
"""A stock Qwen3-MoE under transformers' expert parallelism: its own all-to-all beside hyperep's exchange of tokens.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/huggingface.py

Transformers' exchange, and hyperep's through the first door, are loaded by ``from_pretrained`` with a
``DistributedConfig``, and are FSDP2's over the same ranks. Through the second door the same model is under
``hyperep_torch.fully_shard``, and under DDP, which keeps everything but experts whole and gathers nothing; transformers
has no such way. Gradients of all are compared first. Then steps (forward and backward) take turns, so that other work
on the machine disturbs all alike; what counts is the ratio of the medians. A floor, under FSDP2 and under DDP, is the
same model whose layers of experts do what none can do without: raw exchanges of each token once there and back, its
gradient too, and dense products of as many rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from hyperep_torch import fully_shard
from hyperep_torch.host_memory import keep_memory
from hyperep_torch.transformers import EXPERTS_IMPLEMENTATION, expert_parallelize
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, logging
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface


class Floor(EPImplementation):
    """Raw work in place of a layer of experts that transformers has sharded."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.raw = experts, Raw(self.num_local_experts, ep_mesh)

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """As experts are called."""
        return self.raw(hidden_states, top_k_index, top_k_weights, self.experts.gate_up_proj, self.experts.down_proj)


class FloorExperts(nn.Module):
    """The same with weights that are this rank's own."""

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.to_local().detach())
        self.down_proj = nn.Parameter(experts.down_proj.to_local().detach())
        self.raw = Raw(self.down_proj.shape[0], mesh)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """As experts are called."""
        return self.raw(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


class Raw:
    """Exchanges and products of a layer's sizes; what they are of is meaningless."""

    def __init__(self, num_local_experts: int, mesh: DeviceMesh) -> None:
        self.num_local_experts, self.group, self.ranks = num_local_experts, mesh.get_group(), mesh.size()
        self.sizes: tuple[list[int], list[int]] | None = None
        """Tokens to each rank, and from each."""

    def __call__(
        self,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        """In every step on the same tokens."""
        if self.sizes is None:
            self.sizes, rows = self._counted(indices)
            self.rows = tokens.new_ones(rows, tokens.shape[1])
        return _Raw.apply(tokens, weights, gate_up, down, self)

    def _counted(self, indices: torch.Tensor) -> tuple[tuple[list[int], list[int]], int]:
        """The sizes, and how many rows this rank's experts have."""
        owners = indices // self.num_local_experts
        told = torch.tensor([[(owners == rank).any(1).sum(), (owners == rank).sum()] for rank in range(self.ranks)])
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=self.group)
        return (told[:, 0].tolist(), heard[:, 0].tolist()), int(heard[:, 1].sum())

    def there_and_back(self, tokens: torch.Tensor) -> None:
        """Each token to the ranks of its experts, and as much back."""
        sent, received = self.sizes
        width = tokens.shape[1]
        copies, here = tokens.new_empty(sum(sent), width), tokens.new_empty(sum(received), width)
        dist.all_to_all_single(here, copies, received, sent, self.group)
        dist.all_to_all_single(copies, here, sent, received, self.group)


class _Raw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, raw: Raw
    ) -> torch.Tensor:
        raw.there_and_back(tokens)
        rows = raw.rows
        hidden = rows @ gate_up[0].T
        half = hidden[:, : down.shape[2]].contiguous()
        _ = half @ down[0].T
        ctx.raw = raw
        ctx.save_for_backward(rows, weights, gate_up, down, hidden, half)
        return tokens.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weights, gate_up, down, hidden, half = ctx.saved_tensors
        ctx.raw.there_and_back(gradient)
        _ = rows @ down[0], rows.T @ half, hidden @ gate_up[0], hidden.T @ rows
        return gradient, torch.zeros_like(weights), torch.empty_like(gate_up), torch.empty_like(down), None


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


def inside(directory: str, exchange: str, experts: str) -> nn.Module:
    """The model through the first door: sharded by transformers."""
    ranks = dist.get_world_size()
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation=experts,
        distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=exchange),
    )


def spread(whole: nn.Module, mesh: DeviceMesh, gradients: Literal["mean", "sum"], raw: bool = False) -> nn.Module:
    """The model through the second door."""
    model = expert_parallelize(copy.deepcopy(whole), mesh, gradients=gradients)
    for layer in model.model.layers if raw else ():
        layer.mlp.experts = FloorExperts(layer.mlp.experts, mesh)
    return model


def ways(whole: nn.Module, directory: str) -> dict[str, nn.Module]:
    """The same model in every way, floors last."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    blocks = ("model.embed_tokens", "model.layers.*")
    return {
        "transformers": inside(directory, "all_to_all", "grouped_mm"),
        "first_door": inside(directory, "hyperep", EXPERTS_IMPLEMENTATION),
        "second_door_fsdp": fully_shard(spread(whole, mesh, "sum"), mesh, blocks=blocks),
        "second_door_ddp": DistributedDataParallel(spread(whole, mesh, "mean")),
        "floor": inside(directory, "floor", EXPERTS_IMPLEMENTATION),
        "floor_ddp": DistributedDataParallel(spread(whole, mesh, "mean", raw=True)),
    }


def require_same_gradients(models: dict[str, nn.Module]) -> None:
    """Of every way but the floors, as transformers has them.

    Raises:
        SystemExit: some are not.
    """
    wanted = [p.grad.full_tensor() for p in models["transformers"].parameters()]
    for way in ("first_door", "second_door_fsdp", "second_door_ddp"):
        for (name, parameter), right in zip(models[way].named_parameters(), wanted, strict=True):
            found = parameter.grad.full_tensor() if isinstance(parameter, DTensor) else parameter.grad
            if (found - right).abs().max() > 1e-4 * right.abs().max():
                raise SystemExit(
                    f"{way}: gradients of {name} differ: {(found - right).abs().max()} of {right.abs().max()}"
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
        models = ways(whole, shared[0])
        dist.barrier()
    ids = torch.randint(0, 512, (4, args.tokens // 4), generator=torch.Generator().manual_seed(rank))
    for model in models.values():
        step(model, ids)
    require_same_gradients(models)
    times: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(args.repetitions):
        for way, model in models.items():
            times[way].append(1e3 * step(model, ids))
    medians = {way: statistics.median(found) for way, found in times.items()}
    figures = {
        "ms": {way: round(median, 2) for way, median in medians.items()},
        "ratio": {way: round(median / medians["transformers"], 3) for way, median in medians.items()},
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
