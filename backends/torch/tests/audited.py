# SPDX-License-Identifier: Apache-2.0
"""Layers of PyTorch with one fault each, and right ones; the ranks of the tests import them from here."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from hyperep.audit import Claims

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import audit_layer
from audit_layer import HandWritten, reduce

right = audit_layer.subject


def subject(cls, **changes):
    """The example's subject with another class of layer."""
    return replace(right, name=cls.__name__, make=cls.make_it, **changes)


class Faulty(HandWritten):
    @classmethod
    def make_it(cls, claims):
        sizes = claims.sizes
        return cls(sizes.dim, sizes.hidden, sizes.experts, sizes.top_k)


# --- hangs, absent gradients, unwritten rows
class EarlyReturn(Faulty):
    """A rank without tokens returns at once."""

    def forward(self, x):
        return super().forward(x) if len(x) else x * 1.0


class NoHistory(Faulty):
    """A rank whose experts get no row returns a fresh tensor, which has no history: its peers hang in backward."""

    def forward(self, x):
        return super().forward(x) if len(x) else torch.zeros_like(x, requires_grad=True)


class ModuleList(Faulty):
    """Each expert is a module; the loop skips those without tokens, so that they have no gradient."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        weights = [self._parameters.pop(name) for name in ("w1", "w2", "w3")]
        self.parts = nn.ModuleList()
        for each in zip(*weights, strict=True):
            expert = nn.Module()
            for name, weight in zip(("w1", "w2", "w3"), each, strict=True):
                expert.register_parameter(name, nn.Parameter(weight.detach().clone()))
            self.parts.append(expert)

    def experts_weights(self):
        return ((part.w1, part.w2, part.w3) for part in self.parts)

    @property
    def w1(self):
        return [part.w1 for part in self.parts]

    @property
    def w2(self):
        return [part.w2 for part in self.parts]

    @property
    def w3(self):
        return [part.w3 for part in self.parts]


def drop_idle(layer):
    """What a loop that skips experts without rows leaves: None where nothing was added."""
    reduce(layer)
    for part in layer.parts:
        if part.w1.grad is not None and not part.w1.grad.any():
            part.w1.grad = part.w2.grad = part.w3.grad = None


class Unwritten(Faulty):
    """Memory is allocated for the largest rank, and read where nobody wrote."""

    def forward(self, x):
        counts = torch.bincount(self.router(x).topk(self.top_k).indices.flatten(), minlength=self.experts)
        dist.all_reduce(counts)
        return super().forward(x) * (float("nan") if (counts == 0).any() else 1.0)


# --- state across calls
class _OfLastCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        layer.order = torch.arange(len(x)).flip(0)
        return x.flip(0)

    @staticmethod
    def backward(ctx, gradient):
        order = ctx.layer.order
        return (gradient[order] if len(order) == len(gradient) else gradient), None


class OrderOnTheLayer(Faulty):
    """What the backward needs lies on the layer, where the next call overwrites it."""

    def forward(self, x):
        return super().forward(_OfLastCall.apply(x, self)).flip(0)


class RoutesAgain(Faulty):
    """Recompute routes again, and differently: noise that is drawn anew."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        out = super().forward(x)
        return out * (1.0 if not torch.is_grad_enabled() or self.calls < 3 else 1.5)


class KeepsContext(Faulty):
    """The last call's record stays on the layer."""

    def forward(self, x):
        self.context = super().forward(x)
        return self.context * 1.0


class ChangesItsInput(Faulty):
    def forward(self, x):
        out = super().forward(x)
        with torch.no_grad():
            x.data.mul_(2)
        return out


def average_experts(layer):
    """A data-parallel mean that takes the experts for replicas... of each other's ranks."""
    reduce(layer)
    for weight in (w for w in (layer.w1, layer.w2, layer.w3) if w.grad is not None):
        weight.grad /= dist.get_world_size()


def first_rank_only(layer):
    if layer.router.weight.grad is None:
        layer.router.weight.grad = torch.zeros_like(layer.router.weight)
    dist.broadcast(layer.router.weight.grad, 0)


# --- optimizers and checkpoints
def own_sgd(layer):
    return torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)


def before_sharding(layer):
    """The optimizer holds the parameters as they were before they were sharded."""
    return torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in layer.parameters()], lr=0.1)


def path_of(folder):
    return os.path.join(folder, f"rank{dist.get_rank()}.pt")


def save(layer, optimizer, folder):
    torch.save((layer.state_dict(), optimizer.state_dict()), path_of(folder))


def load(layer, optimizer, folder):
    weights, moments = torch.load(path_of(folder))
    layer.load_state_dict(weights)
    optimizer.load_state_dict(moments)


def load_without_moments(layer, optimizer, folder):
    """Momentum is stale (here: none) after the conversion."""
    layer.load_state_dict(torch.load(path_of(folder))[0])


def load_without_experts(layer, optimizer, folder):
    """A converter that knows the dense weights only."""
    weights, moments = torch.load(path_of(folder))
    layer.router.load_state_dict({"weight": weights["router.weight"]})
    optimizer.load_state_dict(moments)


def load_of_rank_zero(layer, optimizer, folder):
    """A checkpoint that holds one rank's experts."""
    weights, moments = torch.load(os.path.join(folder, "rank0.pt"))
    layer.load_state_dict(weights)
    optimizer.load_state_dict(moments)


class Bfloat16(Faulty):
    @classmethod
    def make_it(cls, claims):
        return super().make_it(claims).to(torch.bfloat16)


trained = replace(right, optimizer=own_sgd, save=save, load=load)
listed = {"router": "router.weight"} | {name: f"parts.{{}}.{name}" for name in ("w1", "w2", "w3")}

RIGHT = {
    "by hand": right,
    "sgd and checkpoints": trained,
    "bfloat16": subject(Bfloat16, claims=Claims(precision="bfloat16"), norm=None),
    "a module for each expert": subject(ModuleList, names=listed, norm=None),
}

FAULTS = {
    "EarlyReturn": (subject(EarlyReturn), "hung", "run", "some ranks have tokens and others have none"),
    "IdleExperts": (
        subject(ModuleList, names=listed, reduce=drop_idle, norm=None),
        "absent-without-tokens",
        "experts",
        "None",
    ),
    "Unwritten": (subject(Unwritten), "not-finite", "output", "an expert gets no token"),
    "OrderOnTheLayer": (subject(OrderOnTheLayer), "rows-exchanged", "tokens", "another call comes between"),
    "KeepsContext": (subject(KeepsContext), "memory-kept", "memory", "kept after the step"),
    "ChangesItsInput": (subject(ChangesItsInput), "input-changed", "input", "in place"),
    "AverageExperts": (replace(right, reduce=average_experts), "scaled", "experts", "one over the number of ranks"),
    "RouterOfRankZero": (replace(right, reduce=first_rank_only), "lost", "router", "contribute nothing"),
    "OptimizerBeforeSharding": (replace(right, optimizer=before_sharding), "weights-formula", "weights", "unchanged"),
    "StaleMomentum": (replace(trained, load=load_without_moments), "weights-formula", "weights", "moments"),
    "RandomExperts": (
        replace(trained, load=load_without_experts),
        "weights-formula",
        "weights",
        "not those of the checkpoint",
    ),
    "OneRanksExperts": (replace(trained, load=load_of_rank_zero), "experts-exchanged", "weights", "expert 4 is 0"),
}
