# SPDX-License-Identifier: Apache-2.0
"""Experts as engineers write them, in every shape, none of which knows of hyperep; and the same layer without ranks."""

from __future__ import annotations

import copy

import hyperep_torch as hep
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

EXPERTS, DIM, HIDDEN, TOP = 4, 6, 8, 2


def _draw(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Written(nn.Module):
    """A fused ``gate_up`` and a ``down``, with biases: an activation of its own, in either layout, by a loop."""

    takes: str | tuple[str, ...] = ("rows", "tokens")

    def __init__(self, *, transposed=False, interleaved=False, grouped=False):
        super().__init__()
        self.transposed, self.interleaved, self.grouped = transposed, interleaved, grouped
        turn = (lambda *s: (s[0], s[2], s[1])) if transposed else (lambda *s: s)
        self.gate_up, self.gate_up_bias = _draw(*turn(EXPERTS, 2 * HIDDEN, DIM)), _draw(EXPERTS, 2 * HIDDEN)
        self.down, self.down_bias = _draw(*turn(EXPERTS, DIM, HIDDEN)), _draw(EXPERTS, DIM)

    def activated(self, both):
        gate, up = (both[:, ::2], both[:, 1::2]) if self.interleaved else both.chunk(2, dim=1)
        return F.gelu(gate.clamp(max=2.0)) * (up + 1)

    def one(self, e, x):
        turned = (lambda w: w.t()) if self.transposed else (lambda w: w)
        both = F.linear(x, turned(self.gate_up[e]), self.gate_up_bias[e])
        return F.linear(self.activated(both), turned(self.down[e]), self.down_bias[e])

    def forward(self, x, *routing):
        if len(routing) == 1:
            if self.grouped:
                (n,), turned = routing, self.transposed
                both = hep.grouped_matmul(x, self.gate_up, n, bias=self.gate_up_bias, transposed=turned)
                return hep.grouped_matmul(self.activated(both), self.down, n, bias=self.down_bias, transposed=turned)
            return torch.cat([self.one(e, run) for e, run in enumerate(x.split(routing[0].tolist()))])
        indices, weights = routing
        out = torch.zeros_like(x)
        for e in range(self.down.shape[0]):  # as many as there are here
            token, choice = torch.where(indices == e)
            out = out.index_add(0, token, self.one(e, x[token]) * weights[token, choice, None])
        return out


class Scaled(Written):
    """A number and buffers for each expert, of which one is changed in place."""

    takes = "rows"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(EXPERTS) + 0.5)
        self.register_buffer("shift", torch.randn(EXPERTS, 1))
        self.register_buffer("seen", torch.zeros(EXPERTS))

    def forward(self, x, n):
        self.seen += n
        of_row = torch.repeat_interleave(torch.arange(len(n)), n)
        return (super().forward(x, n) + self.shift[of_row]) * self.scale[of_row, None]


class OnlyTokens(Written):
    """Called in the one way."""

    takes = "tokens"


class One(nn.Module):
    """An expert of a list: modules in modules."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh())
        self.out = nn.Linear(HIDDEN, DIM)
        self.gain = nn.Parameter(torch.rand(()) + 0.5)
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.rows += len(x)
        return self.out(self.inner(x)) * self.gain


class Listed(nn.Module):
    """What a list of experts computes, by the loop that everybody writes."""

    takes = ("rows", "tokens")

    def __init__(self, one=One):
        super().__init__()
        self.experts = nn.ModuleList(one() for _ in range(EXPERTS))

    def forward(self, x, *routing):
        if len(routing) == 1:
            return torch.cat([one(run) for one, run in zip(self.experts, x.split(routing[0].tolist()), strict=True)])
        indices, weights = routing
        out = torch.zeros_like(x)
        for e, one in enumerate(self.experts):
            token, choice = torch.where(indices == e)
            out = out.index_add(0, token, one(x[token]) * weights[token, choice, None])
        return out


KINDS = {
    "[E, out, in], packed": Written,
    "[E, in, out], interleaved": lambda: Written(transposed=True, interleaved=True),
    "grouped_matmul": lambda: Written(grouped=True),
    "grouped_matmul, [E, in, out]": lambda: Written(transposed=True, grouped=True),
    "called with tokens alone": OnlyTokens,
    "numbers and buffers": Scaled,
    "a list": Listed,
    "a list of linear maps": lambda: Listed(lambda: nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM))),
}


def made(kind):
    """The layer without ranks, and the module that a style is applied to: the same weights, in float64."""
    torch.manual_seed(0)
    plain = KINDS[kind]().double()
    return plain, hep.stack_experts(plain.experts) if isinstance(plain, Listed) else copy.deepcopy(plain)


def calls(module):
    """In which ways it is called."""
    return (module.takes,) if isinstance(module.takes, str) else module.takes


def data(call, rank):
    """Inputs of one rank, of which the floating ones are leaves, and a cotangent; on even ranks expert 1 has none."""
    g = torch.Generator().manual_seed(100 + rank)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    if call == "rows":
        counts = torch.tensor([[3, 0, 4, 2], [1, 2, 0, 8]][rank % 2])
        rows = int(counts.sum())
        return [draw(rows, DIM).requires_grad_(), counts], draw(rows, DIM)
    indices = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP] for _ in range(7)])
    if rank % 2 == 0:
        indices[indices == 1] = 2
    weights = torch.rand(7, TOP, dtype=torch.float64, generator=g).requires_grad_()
    return [draw(7, DIM).requires_grad_(), indices, weights], draw(7, DIM)


def whole(tensor):
    """All of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module, call, rank):
    """Output and gradients of the inputs; those of the weights are added to what is there."""
    inputs, cotangent = data(call, rank)
    out = module(*inputs)
    out.backward(cotangent)
    return [out.detach(), *(x.grad for x in inputs if x.requires_grad)]


def trained(module, call, ranks, steps=3):
    """Results of the first step, weights' gradients in it, and all tensors after some steps of AdamW, by name."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        found = [gradients(module, call, rank) for rank in ranks]
        first = first or (found, {n: p.grad.detach().clone() for n, p in module.named_parameters()})
        optimizer.step()
    return *first, {n: whole(t).detach().clone() for n, t in module.state_dict().items()}


def part_like(tensor, value):
    """The part of the whole *value* that a rank has which holds *tensor*, without communication."""
    if not isinstance(tensor, DTensor):
        return tensor, value
    there = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return tensor.to_local(), there.to_local()


def agree(found, wanted, where):
    """Both of a list, or a dict, of tensors; what is sharded by this rank's part."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        found, wanted = list(found.values()), list(wanted.values())
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        ours, theirs = part_like(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=number: f"{where}, {n}: {m}")


def as_stack(tensors):
    """Tensors of a list of experts, by the names and in the shapes of the stack."""
    names = [name.removeprefix("experts.0.") for name in tensors if name.startswith("experts.0.")]
    return {name: torch.stack([tensors[f"experts.{e}.{name}"] for e in range(EXPERTS)]) for name in names}


def same_as_without_ranks(platform, kind, style, mesh, data_ranks, data_rank):
    """Outputs, all gradients and three steps of the sharded module are those of the plain one on the data of all."""
    for call in calls(made(kind)[0]):
        plain, module = made(kind)
        results, weights, after = trained(plain, call, range(data_ranks))
        if isinstance(plain, Listed):
            weights, after = as_stack(weights), as_stack(after)
        style.apply(module, mesh)
        ours, our_weights, ours_after = trained(module, call, [data_rank])
        where = f"{kind} called with {call} under {type(style).__name__} on rank {platform.rank}"
        agree(ours[0], results[data_rank], where)
        agree(our_weights, weights, f"weights' gradients of {where}")
        agree(ours_after, after, f"after three steps, {where}")
