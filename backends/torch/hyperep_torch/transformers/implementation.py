# SPDX-License-Identifier: Apache-2.0
"""The first door: hyperep's exchange of tokens, as an implementation of expert parallelism that transformers knows.

``DistributedConfig(fsdp_size=R, ep_size=R, ep_implementation="hyperep")`` in ``from_pretrained`` takes it. transformers
then shards the experts, wraps the model in FSDP2 and saves it; what a layer of experts does with its tokens is done
here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from hyperep.exchange.routed import RoutedExperts, over_ranks, routed_from_rows
from hyperep.platform.selection import adopt_mesh
from hyperep_torch.transformers.kernels import declares_its_layout, experts_forward
from hyperep_torch.uncompiled import call_uncompiled

__all__ = ["HyperepEP"]


class HyperepEP(EPImplementation):
    """Tokens travel once to each rank that owns one of their experts, and one sum comes back from there.

    Of a batch that several ranks of ``tp`` share, each sends its part of the tokens, and the sums are gathered.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        mesh = adopt_mesh(ep_mesh)
        self._tp = adopt_mesh(tp_mesh) if tp_mesh.size() > 1 else None
        local: RoutedExperts
        if declares_its_layout(experts):
            local = routed_from_rows(
                mesh.platform, lambda rows, sizes: experts_forward(experts, rows, sizes), self.num_local_experts
            )
        else:
            forward = self.experts_forward

            def local(tokens: Any, indices: Any, weights: Any, *, rows: int | None = None) -> Any:
                return forward(tokens, indices, weights)

        self._routed = over_ranks(local, mesh, self.num_local_experts * mesh.size())

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Each token's experts, weighted and added up: ``[T, D], [T, K], [T, K] -> [T, D]``."""
        forward = self._routed if self._tp is None else self._of_shared_batch
        return call_uncompiled(forward, hidden_states, top_k_index, top_k_weights)

    def _of_shared_batch(self, tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every rank of ``tp`` sends its own of the tokens; each of them then gets all sums."""
        platform, group = self._tp.platform, self._tp.get_group()
        ranks, rank, count = self._tp.size(), self._tp.get_local_rank(), tokens.shape[0]
        mine = slice(count * rank // ranks, count * (rank + 1) // ranks)
        # Gradients of tokens that others sent come from them.
        tokens, weights = platform.copy_to_group(tokens, group), platform.copy_to_group(weights, group)
        done = self._routed(tokens[mine], indices[mine], weights[mine])
        whole = torch.cat(
            [done.new_zeros((mine.start, done.shape[1])), done, done.new_zeros((count - mine.stop, done.shape[1]))]
        )
        return platform.reduce_from_group(whole, group)


EPImplementationInterface.register("hyperep", HyperepEP)
