# SPDX-License-Identifier: Apache-2.0
"""A layer with expert parallelism, written by hand on the loopback platform, in steps that faults can replace."""

from __future__ import annotations

import autograd.numpy as anp
import numpy as np
from autograd.tracer import getval

from hyperep.audit import Claims, PlatformSubject


def plain(x):
    """The numbers, without the tape."""
    while hasattr(x, "_value"):
        x = x._value
    return np.asarray(getval(x))


def swiglu(x, w1, w2, w3):
    gate = anp.matmul(x, w1.T)
    return anp.matmul(gate / (1 + anp.exp(-gate)) * anp.matmul(x, w3.T), w2.T)


def is_expert(name):
    return name != "router" and not name.startswith("shared_")


class Layer:
    """Tokens of each rank's own, a row for each choice, sums over ranks; the steps of the way are methods."""

    claims = Claims()

    def __init__(self, platform, claims):
        self.platform, self.claims = platform, claims
        self.ranks, self.rank = platform.world_size, platform.rank
        self.experts, self.top_k = claims.sizes.experts, claims.sizes.top_k
        self.local = self.experts // self.ranks

    # --- what a user writes
    def __call__(self, m, x):
        chosen, scores = self.route(m, x)
        sent, back = self.sort(chosen)
        rows = self.rows(x, sent)
        counts = np.bincount(chosen.ravel()[sent], minlength=self.experts)[: self.experts].reshape(self.ranks, -1)
        theirs = plain(self.platform.all_to_all_single(counts)).reshape(self.ranks, -1)
        arrived = self.exchange(rows, counts.sum(1), theirs.sum(1))
        done = self.compute(m, arrived, theirs)
        returned = self.give_back(done, theirs.sum(1), counts.sum(1))
        out = self.combine(returned, back, scores, chosen)
        return out + self.shared(m, x) if self.claims.shared else out

    def logits(self, m, x):
        return anp.matmul(x, m.router.T)

    def choose(self, m, x):
        return np.argsort(-plain(self.logits(m, x)), axis=1, kind="stable")[:, : self.top_k]

    def route(self, m, x):
        chosen = self.choose(m, x)
        raw = self.logits(m, x)
        powers = anp.exp(raw)
        every = 1 / (1 + anp.exp(-raw)) if self.claims.scores == "sigmoid" else powers / powers.sum(axis=1)[:, None]
        scores = every[np.arange(len(x))[:, None], chosen]  # [T, K]
        return chosen, self.claims.scale * self.normalized(scores)

    def normalized(self, scores):
        return scores / scores.sum(axis=1)[:, None] if self.claims.normalize else scores

    def sort(self, chosen):
        """The choices in the order of experts, and where each is in that order."""
        order = np.argsort(chosen.ravel(), kind="stable")
        return order, np.argsort(order, kind="stable")

    def rows(self, x, sent):
        return x[sent // self.top_k]

    def exchange(self, rows, mine, theirs):
        return self.platform.differentiable_all_to_all_single(rows, list(mine), list(theirs))

    def compute(self, m, arrived, counts):
        """Rows ``[N, D]``, rank by rank and inside that expert by expert; ``counts [R, L]``."""
        starts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        of_expert = [
            np.concatenate([np.arange(starts[r, e], starts[r, e] + counts[r, e]) for r in range(self.ranks)])
            for e in range(self.local)
        ]
        done = [self.expert(m, e, arrived[index.astype(int)]) for e, index in enumerate(of_expert)]
        everything = np.concatenate(of_expert).astype(int)
        return anp.concatenate(done)[np.argsort(everything, kind="stable")]

    def expert(self, m, e, x):
        return swiglu(x, m.w1[e], m.w2[e], m.w3[e])

    def give_back(self, done, theirs, mine):
        return self.exchange(done, theirs, mine)

    def combine(self, returned, back, scores, chosen):
        rows = returned[back].reshape(*scores.shape, returned.shape[1])  # [T, K, D]
        return (rows * scores[:, :, None]).sum(axis=1)

    def shared(self, m, x):
        return swiglu(x, m.shared_w1, m.shared_w2, m.shared_w3)

    # --- what a user does after backward
    @staticmethod
    def reduce(platform, gradients, claims):
        """Sum the replicated ones over ranks; what experts have is whole."""
        mean = platform.world_size if claims.reduction == "mean" else 1
        return {
            name: (gradient if is_expert(name) else platform.all_reduce(gradient)) / mean
            for name, gradient in gradients.items()
        }

    @staticmethod
    def norm(platform, gradients):
        local = sum((g**2).sum() for name, g in gradients.items() if is_expert(name))
        dense = sum((g**2).sum() for name, g in gradients.items() if not is_expert(name))
        return np.sqrt(platform.all_reduce(np.array([local]))[0] + dense)

    @staticmethod
    def initial(platform, shapes):
        """Each parameter's local part."""
        rank = platform.rank
        return {
            name: np.random.default_rng([len(name), rank if is_expert(name) else 0, i]).normal(size=shape)
            for i, (name, shape) in enumerate(shapes.items())
        }


def subject_of(kind=Layer, claims=None):
    """The subject of a layer's class."""
    claims = kind.claims if claims is None else claims

    def make(platform, claims):
        layer = kind(platform, claims)
        shapes = {
            name: (shape[0] // platform.world_size, *shape[1:]) if claims.kind(name) == "experts" else shape
            for name, shape in claims.shapes.items()
        }
        values = {name: value.astype(np.float32) for name, value in kind.initial(platform, shapes).items()}
        return platform.make_module(kind.__name__, values, lambda m, x: layer(m, x))

    return PlatformSubject(
        make=make,
        names={name: name for name in claims.shapes},
        claims=claims,
        name=kind.__name__,
        reduce=lambda platform, gradients: kind.reduce(platform, gradients, claims),
        norm=kind.norm,
    )
