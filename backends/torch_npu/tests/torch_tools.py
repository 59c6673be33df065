# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own tools on parameters that are sharded over Ascend devices; run on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from measure import rows
from torch.distributed.device_mesh import init_device_mesh as init_native_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hyperep
from hyperep.moe import MoE

DIM, HIDDEN, EXPERTS = 8, 12, 4


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest deviation, relative to the largest entry; whole tensors are compared."""
    a, b = (t.full_tensor() if isinstance(t, DTensor) else t for t in (a.detach(), b.detach()))
    return float((a - b).abs().max() / b.abs().max())


def layer(platform: Any) -> Any:
    """An MoE layer, the same on every rank."""
    return MoE(platform, DIM, HIDDEN, EXPERTS, 2, seed=5)


def optimizer_clipping_and_checkpoint(platform: Any, folder: str) -> None:
    """Expert-parallel training with PyTorch's optimizer, clipping and checkpoint, against one rank's."""
    size = platform.world_size
    mesh = init_native_mesh("npu", (size,), mesh_dim_names=("ep",))
    reference, sharded = layer(platform), layer(platform)
    hyperep.ExpertParallel().apply(sharded.experts, mesh)
    tokens = [platform.from_host(rows(rank, 10, DIM)) for rank in range(size)]
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.05, foreach=False) for m in (sharded, reference))
    for _ in range(3):
        sharded(tokens[platform.rank]).square().sum().backward()
        for p in sharded.router.parameters():
            p.grad = platform.all_reduce(p.grad)
        reference(torch.cat(tokens)).square().sum().backward()
        for name, p in sharded.named_parameters():
            assert relative(p.grad, reference.get_parameter(name).grad) < 1e-5, name
        experts, whole = (torch.nn.utils.clip_grad_norm_(m.experts.parameters(), 0.5) for m in (sharded, reference))
        assert relative(experts, whole) < 1e-5
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    # Adam divides by the root of tiny second moments, which spreads rounding errors.
    for name, p in sharded.named_parameters():
        assert relative(p, reference.get_parameter(name)) < 1e-4, name
    dcp.save({"model": sharded.state_dict()}, checkpoint_id=folder)
    again = layer(platform)
    hyperep.ExpertParallel().apply(again.experts, mesh)
    state = {name: torch.zeros_like(value) for name, value in again.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=folder)
    again.load_state_dict(state)
    for name, p in again.named_parameters():
        assert relative(p, sharded.get_parameter(name)) == 0, name


def fsdp2(platform: Any) -> None:
    """FSDP2 over dp and expert parallelism over ep on one native mesh, against the unsharded layer."""
    native = init_native_mesh("npu", (2, 2), mesh_dim_names=("dp", "ep"))
    reference, sharded = layer(platform), layer(platform)
    hyperep.ExpertParallel().apply(sharded.experts, native["ep"])
    for module in (sharded.experts, sharded):
        fully_shard(module, mesh=native["dp"])
    tokens = [platform.from_host(rows(rank, 10, DIM)) for rank in range(4)]
    found, expected = sharded(tokens[platform.rank]), reference(torch.cat(tokens))
    assert relative(found, expected.split(10)[platform.rank]) < 1e-5
    found.square().sum().backward()
    expected.square().sum().backward()
    for name in ("w1", "w2", "w3"):
        gradient = sharded.experts.get_parameter(name).grad
        assert relative(2 * gradient, reference.experts.get_parameter(name).grad) < 1e-5  # FSDP2 takes the mean over dp
