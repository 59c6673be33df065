# SPDX-License-Identifier: Apache-2.0
"""Right layers in different styles, all written by hand; none may be accused."""

import math
from dataclasses import replace

import autograd.numpy as anp
import numpy as np
from faults import AllReduced
from hand_written import Layer, plain

from hyperep.audit import RELU_MLP, Claims, Sizes


class Capacity(Layer):
    """Each expert takes so many tokens of each rank; the rest is dropped."""

    claims = Claims(capacity=1.0)

    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, scores * self.kept(plain(scores), chosen), chosen)

    def kept(self, scores, chosen):
        capacity = math.ceil(self.claims.capacity * chosen.size / self.experts)
        keep = np.zeros(chosen.shape)
        for e in range(self.experts):
            rows, slots = np.nonzero(chosen == e)
            order = np.arange(len(rows))
            if self.claims.drop == "probability":
                order = np.argsort(-self.every[rows, e], kind="stable")
            keep[rows[order[:capacity]], slots[order[:capacity]]] = 1.0
        return keep

    def logits(self, m, x):
        found = super().logits(m, x)
        self.every = plain(found)
        self.every = np.exp(self.every) / np.exp(self.every).sum(axis=1, keepdims=True)
        return found


class Mlp(Layer):
    claims = Claims(expert=RELU_MLP)

    def expert(self, m, e, x):
        hidden = anp.maximum(anp.matmul(x, m.w1[e].T) + m.b1[e], 0)
        return anp.matmul(hidden, m.w2[e].T) + m.b2[e]


class ScoresOnInputs(Layer):
    """Scores multiply what goes to the experts."""

    claims = Claims(weighting="input")

    def route(self, m, x):
        chosen, scores = super().route(m, x)
        self.scores = scores
        return chosen, scores

    def rows(self, x, sent):
        flat = self.scores.reshape((-1,))[sent]
        return super().rows(x, sent) * flat[:, None]

    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, anp.ones_like(plain(scores)), chosen)


class OwnGradients(Layer):
    claims = Claims(replicated="own", shared=True)

    @staticmethod
    def reduce(platform, gradients, claims):
        return gradients


class AllReducedWithShared(AllReduced):
    """A shared batch; the shared expert is computed whole on every rank."""

    claims = Claims(batch="shared", shared=True)

    def __call__(self, m, x):
        return super().__call__(m, x) + self.shared(m, x)


RIGHT = {
    "sum": (Layer, Claims()),
    "mean": (Layer, Claims(reduction="mean", shared=True)),
    "sigmoid, scaled": (Layer, Claims(scores="sigmoid", scale=2.5)),
    "scores not normalised": (Layer, Claims(normalize=False)),
    "top-1": (Layer, replace(Claims(normalize=False), sizes=Sizes(top_k=1))),
    "capacity by probability": (Capacity, Capacity.claims),
    "capacity by position": (Capacity, replace(Capacity.claims, drop="position")),
    "equal numbers of tokens": (Capacity, replace(Capacity.claims, equal_tokens=True, empty_batches=False)),
    "scores on inputs": (ScoresOnInputs, ScoresOnInputs.claims),
    "experts with biases": (Mlp, Mlp.claims),
    "gradients reduced elsewhere": (OwnGradients, OwnGradients.claims),
    "shared batch": (AllReduced, AllReduced.claims),
    "shared batch and expert": (AllReducedWithShared, AllReducedWithShared.claims),
}
