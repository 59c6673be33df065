# SPDX-License-Identifier: Apache-2.0
"""Audit a layer that was written by hand.

    hyperep audit run --subject audit_layer:subject --world-size 1,2,4

Copy this, and put your own layer in the place of ``HandWritten``; see docs/audit.md.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hyperep_torch.audit import ModuleSubject
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from hyperep.audit import Claims


class HandWritten(nn.Module):
    """Each token goes to its experts' ranks and back, a row for each choice."""

    def __init__(self, dim, hidden, experts, top_k):
        super().__init__()
        self.ranks, self.experts, self.top_k = dist.get_world_size(), experts, top_k
        self.router = nn.Linear(dim, experts, bias=False)
        # All experts are drawn on every rank, and each rank keeps its own: no two begin alike.
        for name, shape in (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))):
            every = torch.randn(experts, *shape) / shape[1] ** 0.5
            setattr(self, name, nn.Parameter(every.chunk(self.ranks)[dist.get_rank()].clone()))

    def forward(self, x):
        """Tokens ``[T, D]``."""
        scores, chosen = self.router(x).softmax(-1).topk(self.top_k)
        scores = scores / scores.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.experts)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        mine, theirs = counts.view(self.ranks, -1), theirs.view(self.ranks, -1)
        send, receive = mine.sum(1).tolist(), theirs.sum(1).tolist()
        rows = all_to_all_single_autograd(x[order // self.top_k], receive, send, dist.group.WORLD)
        expert = torch.arange(theirs.shape[1]).repeat(self.ranks).repeat_interleave(theirs.flatten())
        done = torch.zeros_like(rows)
        for e, (w1, w2, w3) in enumerate(zip(self.w1, self.w2, self.w3, strict=True)):
            of_e = (expert == e).nonzero().flatten()
            done = done.index_add(0, of_e, (F.silu(rows[of_e] @ w1.T) * (rows[of_e] @ w3.T)) @ w2.T)
        back = all_to_all_single_autograd(done, send, receive, dist.group.WORLD)[order.argsort()]
        return (back.view(*chosen.shape, -1) * scores[..., None]).sum(1) if len(x) else x + back.sum()


def make(claims):
    """The layer on this rank."""
    sizes = claims.sizes
    return HandWritten(sizes.dim, sizes.hidden, sizes.experts, sizes.top_k)


def reduce(layer):
    """Experts have the tokens of all ranks; the router's gradient is summed here."""
    if layer.router.weight.grad is None:
        layer.router.weight.grad = torch.zeros_like(layer.router.weight)
    dist.all_reduce(layer.router.weight.grad)


def norm(layer):
    """Squares of the experts are added over ranks, those of the router are not."""
    squares = sum((w.grad**2).sum() for w in (layer.w1, layer.w2, layer.w3))
    dist.all_reduce(squares)
    return (squares + (layer.router.weight.grad**2).sum()).sqrt()


subject = ModuleSubject(
    name="a layer written by hand",
    make=make,
    names={"router": "router.weight", "w1": "w1", "w2": "w2", "w3": "w3"},
    reduce=reduce,
    norm=norm,
    claims=Claims(),  # softmax scores that sum to one, SwiGLU, dropless, gradients summed over ranks
)
