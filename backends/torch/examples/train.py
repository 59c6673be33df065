# SPDX-License-Identifier: Apache-2.0
"""Train a small mixture-of-experts language model, its experts spread over ranks, with what PyTorch has.

    torchrun --nproc-per-node 4 train.py --ep 2

Only the four names that begin with ``hep`` are hyperep's. Without torchrun it trains the same model on one rank, where
nothing is sharded: the same seed gives the same losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import hyperep_torch as hep
import torch
import torch.distributed as dist
import torch.nn.functional as F
from language_model import Transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module


def settings() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts; a divisor of all ranks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="sequences of all ranks together")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file to learn")
    parser.add_argument("--save", type=Path, help="where the whole weights go in the end")
    return parser.parse_args()


def batches(
    text: bytes, args: argparse.Namespace, rank: int, ranks: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes and the ones after them, ``[B, S]``, of this rank's share of each step."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    chosen = torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=chosen)
        rows = torch.stack([data[start : start + args.context + 1] for start in starts.tolist()])
        own = rows.tensor_split(ranks)[rank].to(args.device)
        yield own[:, :-1], own[:, 1:]


def main() -> None:
    """The program."""
    args = settings()
    torch.set_default_dtype(getattr(torch, args.dtype))
    launched = dist.is_torchelastic_launched()
    if launched:
        dist.init_process_group()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)

    with torch.device("meta"):
        model = Transformer(
            dim=64,
            context=args.context,
            moe=lambda: hep.MoE(dim=64, hidden_dim=96, num_experts=8, top_k=2),
        )
    if launched:
        mesh = init_device_mesh(args.device, (ranks // args.ep, args.ep), mesh_dim_names=("efsdp", "ep"))
        parallelize_module(model, mesh["ep"], {"layers.*.moe.experts": hep.ExpertParallel()})
        hep.fully_shard(model, mesh, blocks="layers.*")
    model.to_empty(device=args.device)
    hep.init_weights(model, seed=0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step, (x, y) in enumerate(batches(args.text.read_bytes(), args, rank, ranks)):
        loss = F.cross_entropy(model(x), y.flatten())  # a mean over this rank's tokens
        loss.backward()
        norm = hep.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        if launched:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step} loss {mean.item():.12f} norm {norm.item():.12f}", flush=True)
    if args.save:
        whole = {name: p.full_tensor() if launched else p for name, p in model.state_dict().items()}
        if rank == 0:
            torch.save(whole, args.save)
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
