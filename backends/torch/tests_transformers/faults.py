# SPDX-License-Identifier: Apache-2.0
"""Faults that every check must notice: a router whose gradient is cut, gradients that nobody reduces."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils._pytree import tree_map_only

Fault = Literal["router cut", "reduction left out"]

ROUTERS = ("gate", "router")
"""What the modules of transformers that choose experts are called in their blocks."""


def cut_router(model: nn.Module) -> None:
    """No gradient comes back to a router any more."""

    def cut(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)

    routers = [module for path, module in model.named_modules() if path.rpartition(".")[2] in ROUTERS]
    assert routers
    for router in routers:
        router.register_forward_hook(cut)


def leave_out_reduction(model: nn.Module) -> None:
    """FSDP2 keeps this rank's part of its own gradient, and adds nobody else's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_Own())


class _Own(DefaultReduceScatter):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])
