# SPDX-License-Identifier: Apache-2.0
"""Layers with one fault each, as they were met in the field, and what the audit has to say of them."""

from __future__ import annotations

from dataclasses import replace

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive
from hand_written import Layer, plain, swiglu

from hyperep.audit import Claims

FAULTS = {}
"""Class -> cause, quantity, where, and further words that the finding must hold."""


def fault(cause, quantity, where="all", *words):
    """Register a layer with the diagnosis that it must get."""

    def register(cls):
        FAULTS[cls] = (cause, quantity, where, words)
        return cls

    return register


@primitive
def _scaled_backward(x, factor):
    return x + 0.0


defvjp(_scaled_backward, lambda ans, x, factor: lambda g: g * factor, None)


@primitive
def _cut(x):
    return x + 0.0


defvjp(_cut, lambda ans, x: lambda g: np.zeros_like(g))


def changed_backward(function):
    """The identity, with *function* as its backward."""

    @primitive
    def identity(x):
        return x + 0.0

    defvjp(identity, lambda ans, x: lambda g: function(plain(g)))
    return identity


# ------------------------------------------------------------------------------------------ reductions of gradients
@fault("scaled", "experts", "all", "the number of ranks", "not averaged")
class ExpertsSummedNotAveraged(Layer):
    """pytorch#160285: the mean is meant, and the exchange has summed."""

    claims = Claims(reduction="mean")

    @staticmethod
    def reduce(platform, gradients, claims):
        found = Layer.reduce(platform, gradients, claims)
        return {n: g * platform.world_size if n.startswith("w") else g for n, g in found.items()}


@fault("scaled", "experts", "all", "one over the number of ranks", "different experts")
class ExpertsAveragedNotSummed(Layer):
    @staticmethod
    def reduce(platform, gradients, claims):
        found = Layer.reduce(platform, gradients, claims)
        return {n: g / platform.world_size if n.startswith("w") else g for n, g in found.items()}


@fault("scaled", "experts", "all", "the number of ranks", "likewise")
class CombineSumsCotangents(Layer):
    """Everything below the way back is too large: a sum over ranks as the backward of what was whole."""

    def give_back(self, done, theirs, mine):
        return _scaled_backward(super().give_back(done, theirs, mine), float(self.ranks))


@fault("lost", "router", "others", "nobody reduces")
class RouterNotReduced(Layer):
    @staticmethod
    def reduce(platform, gradients, claims):
        return gradients


@fault("lost", "router", "rank", "contribute nothing")
class RouterOfRankZeroOnly(Layer):
    """transformers#48687: one rank's gradient is broadcast."""

    @staticmethod
    def reduce(platform, gradients, claims):
        router = platform.broadcast(gradients["router"], 0)
        return {**gradients, "router": router}


@fault("scaled", "router", "all", "the number of ranks")
class RouterReducedTwice(Layer):
    @staticmethod
    def reduce(platform, gradients, claims):
        found = Layer.reduce(platform, gradients, claims)
        return {**found, "router": platform.all_reduce(found["router"])}


@fault("lost", "shared", "others", "nobody reduces")
class SharedNotReduced(Layer):
    claims = Claims(shared=True)

    @staticmethod
    def reduce(platform, gradients, claims):
        return {
            n: g if n.startswith("shared") else platform.all_reduce(g) if n == "router" else g
            for n, g in gradients.items()
        }


# ---------------------------------------------------------------------------------------------- scores and the router
@fault("scores-exchanged", "output", "all", "wrong experts")
class ScoresNotSorted(Layer):
    """NeMo Automodel#2995: rows are in the order of experts, their scores are not."""

    def combine(self, returned, back, scores, chosen):
        by_number = np.argsort(chosen, axis=1, kind="stable")
        return super().combine(returned, back, scores[np.arange(len(scores))[:, None], by_number], chosen)


@fault("scores-exchanged", "output", "all", "other tokens")
class ScoresOfSortedRows(Layer):
    """The rows come back in the order of experts, and meet scores in the order of tokens."""

    def combine(self, returned, back, scores, chosen):
        flat = scores.reshape(-1)[np.argsort(chosen.ravel(), kind="stable")]
        return super().combine(returned, back, flat.reshape(scores.shape), chosen)


@fault("lost", "router", "all", "detached")
class ScoresDetached(Layer):
    """transformers#45473: the router learns nothing, and the loss looks fine."""

    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, _cut(scores), chosen)


@fault("scores-formula", "output", "all", "not divided by their sum")
class ScoresNotNormalised(Layer):
    def normalized(self, scores):
        return scores


@fault("scores-formula", "output", "all", "the score itself")
class OneScoreOverItself(Layer):
    """top-1 whose score is divided by itself: it is 1, and trains no router."""

    claims = replace(Claims(), sizes=replace(Claims().sizes, top_k=1), normalize=False)

    def normalized(self, scores):
        return scores / scores.sum(axis=1)[:, None]


@fault("scores-formula", "output", "all", "applied twice")
class ScoresTwice(Layer):
    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, scores * scores, chosen)


@fault("scores-formula", "output", "all", "not applied")
class ScoresForgotten(Layer):
    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, anp.ones_like(plain(scores)), chosen)


@fault("backward-formula", "experts", "all", "scores are left out")
class BackwardWithoutScores(Layer):
    """A backward written by hand, which hands the cotangent on as it is."""

    def combine(self, returned, back, scores, chosen):
        flat = plain(scores).reshape(-1)[np.argsort(back, kind="stable")]
        undo = changed_backward(lambda g: (g / flat[:, None]).astype(g.dtype))
        return super().combine(undo(returned), back, scores, chosen)


@fault("backward-formula", "experts", "all", "applied twice in the backward pass")
class BackwardWithScoresTwice(Layer):
    """A fused backward weights what autograd weights again."""

    def combine(self, returned, back, scores, chosen):
        flat = plain(scores).reshape(-1)[np.argsort(back, kind="stable")]
        again = changed_backward(lambda g: (g * flat[:, None]).astype(g.dtype))
        return super().combine(again(returned), back, scores, chosen)


@fault("backward-formula", "router", "all", "multiplied by the scores")
class ScoreGradientsOfWeightedRows(Layer):
    """What experts returned is kept for backward when it has been weighted already."""

    def combine(self, returned, back, scores, chosen):
        weighted = changed_backward(lambda g: g * plain(scores))
        return super().combine(returned, back, weighted(scores), chosen)


@fault("backward-formula", "router", "all", "next token")
class ScoreGradientsOfOtherTokens(Layer):
    def combine(self, returned, back, scores, chosen):
        moved = changed_backward(lambda g: np.roll(g, -1, axis=0))
        return super().combine(returned, back, moved(scores), chosen)


@fault("backward-formula", "router", "all", "reverse order")
class ScoreGradientsReversed(Layer):
    def combine(self, returned, back, scores, chosen):
        moved = changed_backward(lambda g: g[:, ::-1])
        return super().combine(returned, back, moved(scores), chosen)


@fault("backward-formula", "experts", "all", "sorted by expert with the inverse")
class BackwardSortsWithTheInverse(Layer):
    """The permutation of the backward pass is that of the forward pass, where the rows go the other way."""

    def combine(self, returned, back, scores, chosen):
        wrong = changed_backward(lambda g: g[back][back])  # what comes in is sorted: first undo that
        return super().combine(wrong(returned), back, scores, chosen)


@fault("backward-formula", "tokens", "all", "put back in the order of tokens with the permutation that sorts")
class BackwardPutsBackWithTheSort(Layer):
    def rows(self, x, sent):
        wrong = changed_backward(lambda g: g[sent][sent])
        return wrong(super().rows(x, sent))


# --------------------------------------------------------------------------------------------------- the exchange
@fault("lost", "output", "exchanged", "does not come back")
class RemoteOutputsLost(Layer):
    def give_back(self, done, theirs, mine):
        returned = super().give_back(done, theirs, mine)
        starts = np.cumsum([0, *mine])
        keep = np.zeros((len(returned), 1))
        keep[starts[self.rank] : starts[self.rank + 1]] = 1.0
        return returned * keep


@fault("lost", "experts", "exchanged", "passes no gradient")
class ExchangeWithoutBackward(Layer):
    """A plain collective on the way back: what was computed for others gets no gradient."""

    def give_back(self, done, theirs, mine):
        starts = np.cumsum([0, *theirs])
        own = slice(starts[self.rank], starts[self.rank + 1])
        keep = np.zeros((len(done), 1))
        keep[own] = 1.0
        stop = changed_backward(lambda g: g * keep)
        return super().give_back(stop(done), theirs, mine)


@fault("raised", "run", "all", "in backward", "those of the forward pass, exchanged")
class BackwardKeepsTheSplits(Layer):
    """Where ranks send one another unequal numbers of rows, the backward pass goes the other way."""

    def exchange(self, rows, mine, theirs):
        there = primitive(lambda rows: plain(self.platform.all_to_all_single(plain(rows), list(theirs), list(mine))))
        defvjp(there, lambda ans, rows: there)
        return there(rows)


@fault("rows-exchanged", "output", "all", "order")
class RowsNotPutBack(Layer):
    """The tokens of a rank come back in reverse."""

    def combine(self, returned, back, scores, chosen):
        return super().combine(returned, back, scores, chosen)[::-1]


@fault("experts-exchanged", "output", "all", "expert 3 answers for 2")
class ExpertsTwoAndThreeExchanged(Layer):
    def expert(self, m, e, x):
        e = {2: 3, 3: 2}.get(e + self.rank * self.local, e + self.rank * self.local) - self.rank * self.local
        return super().expert(m, e, x)


@fault("experts-exchanged", "output", "all", "experts of rank 0")
class ExpertsOfRankZeroEverywhere(Layer):
    """A data-parallel wrapper has broadcast them."""

    def __call__(self, m, x):
        for name in ("w1", "w2", "w3") if self.ranks > 1 else ():
            setattr(m, name, self.platform.broadcast(plain(getattr(m, name)), 0))
        return super().__call__(m, x)


@fault("experts-exchanged", "output", "all", "in turn")
class ExpertsInTurn(Layer):
    """Tokens are sent as if experts were dealt to ranks in turn."""

    def choose(self, m, x):
        chosen = super().choose(m, x)
        return chosen

    def sort(self, chosen):
        placed = (chosen % self.ranks) * self.local + chosen // self.ranks
        chosen[...] = placed
        return super().sort(chosen)


@fault("not-finite", "output", "all", "nobody wrote", "gets no token")
class UnwrittenRows(Layer):
    """DeepSpeed#8147: where an expert has no row, memory is allocated and not filled."""

    def compute(self, m, arrived, counts):
        done = super().compute(m, arrived, counts)
        idle = counts.sum(axis=0) == 0
        return done * np.nan if idle.any() and len(done) else done


@fault("lost", "output", "place", "fixed size")
class BufferTooSmall(Layer):
    """Tokens beyond the fourth of an expert are dropped without a word."""

    def combine(self, returned, back, scores, chosen):
        seen = np.zeros(self.experts, dtype=int)
        keep = np.zeros(scores.shape)
        for (t, k), e in np.ndenumerate(chosen):
            keep[t, k] = seen[e] < 4
            seen[e] += 1
        return super().combine(returned, back, scores * keep, chosen)


@fault("scaled", "output", "way", "shared expert", "number of ranks")
class SharedOncePerRank(Layer):
    """A shared expert (or the bias of a row-parallel one) that is added before a sum over ranks."""

    claims = Claims(shared=True)

    def shared(self, m, x):
        return super().shared(m, x) * self.ranks


# -------------------------------------------------------------------------------------------------- empty experts
@fault("absent-without-tokens", "experts", "expert", "None")
class NoGradientWithoutTokens(Layer):
    """torchtitan#2416: the loop over experts skips those without rows."""

    def compute(self, m, arrived, counts):
        self.idle = counts.sum(axis=0) == 0
        self.platform.idle = bool(self.idle.all())
        return super().compute(m, arrived, counts)

    @staticmethod
    def reduce(platform, gradients, claims):
        found = Layer.reduce(platform, gradients, claims)
        return {n: None if n.startswith("w") and platform.idle else g for n, g in found.items()}

    @staticmethod
    def norm(platform, gradients):
        return Layer.norm(platform, gradients)


@fault("gradient-without-tokens", "experts", "expert", "dummy")
class GarbageForEmptyExperts(Layer):
    """A grouped kernel that does not write the weight gradient of a group of size zero."""

    def compute(self, m, arrived, counts):
        idle = counts.sum(axis=0) == 0
        garbage = changed_backward(lambda g: g + 0.3 * idle[:, None, None])
        m.w1 = garbage(m.w1)
        return super().compute(m, arrived, counts)


@fault("raised", "run", "all", "different collectives", "some ranks have tokens and others have none")
class EarlyReturnWithoutTokens(Layer):
    """The classic: a rank without tokens returns at once, and the others wait for it."""

    def __call__(self, m, x):
        if not len(x):
            return x * 1.0
        return super().__call__(m, x)


# ----------------------------------------------------------------------------------------------- state across calls
@fault("rows-exchanged", "tokens", "all", "called several times")
class OrderKeptOnTheLayer(Layer):
    """Splits and orders live on the object: the backward of an earlier call finds those of a later one."""

    def __init__(self, platform, claims):
        super().__init__(platform, claims)
        self.order = None

    def __call__(self, m, x):
        self.order = np.arange(len(x)) if self.order is None else np.arange(len(x))[::-1]
        size = len(x)
        late = changed_backward(lambda g: g[self.order] if len(self.order) == size else g[::-1])
        return super().__call__(m, late(x))


@fault("lost", "experts", "step", "earlier step")
class AccumulationOverwrites(Layer):
    """The second micro-batch's gradients take the place of the first one's."""

    def __init__(self, platform, claims):
        super().__init__(platform, claims)
        platform.last = {}

    def compute(self, m, arrived, counts):
        for name in ("w1", "w2", "w3"):
            setattr(m, name, changed_backward(lambda g, name=name: self.instead(name, g))(getattr(m, name)))
        return super().compute(m, arrived, counts)

    def instead(self, name, g):
        before = self.platform.last.get((id(self), name), 0.0)
        self.platform.last[id(self), name] = g
        return g - before

    @staticmethod
    def reduce(platform, gradients, claims):
        platform.last = {}
        return Layer.reduce(platform, gradients, claims)


@fault("stale", "experts", "step", "another step")
class GradientOfTheStepBefore(Layer):
    """The gradient that is read is the last step's: this one's is not there yet."""

    @staticmethod
    def reduce(platform, gradients, claims):
        found = Layer.reduce(platform, gradients, claims)
        before, platform.before = getattr(platform, "before", None), found
        return {n: (before or found)[n] if n.startswith("w") else g for n, g in found.items()}


@fault("input-changed", "input", "rank", "in place")
class InputChanged(Layer):
    def __call__(self, m, x):
        out = super().__call__(m, x)
        plain(x)[...] *= 2.0
        return out


@fault("not-deterministic", "bits", "all", "different bits")
class SumsByChance(Layer):
    runs = 0

    def combine(self, returned, back, scores, chosen):
        type(self).runs += 1
        return super().combine(returned, back, scores, chosen) * np.float32(1 + 1e-6 * (type(self).runs % 5))


# ------------------------------------------------------------------------------------------------------------ norms
@fault("norm-formula", "norm", "all", "omitted")
class NormOmitsExperts(Layer):
    """Megatron-LM#5916."""

    @staticmethod
    def norm(platform, gradients):
        return np.sqrt(sum((g**2).sum() for name, g in gradients.items() if not name.startswith("w")))


@fault("norm-formula", "norm", "all", "once for each rank")
class NormCountsReplicas(Layer):
    """Megatron-LM#5844: squares of all gradients are added over ranks, those that every rank holds too."""

    @staticmethod
    def norm(platform, gradients):
        return np.sqrt(platform.all_reduce(np.array([sum((g**2).sum() for g in gradients.values())]))[0])


@fault("norm-formula", "norm", "all", "only its own experts")
class NormOfEachRank(Layer):
    @staticmethod
    def norm(platform, gradients):
        return np.sqrt(sum((g**2).sum() for g in gradients.values()))


# -------------------------------------------------------------------------------------------------- initial weights
@fault("initial-alike-on-ranks", "initial", "all", "same seed")
class ExpertsBeginAlike(Layer):
    """transformers#48205: every rank draws its experts from the same seed."""

    @staticmethod
    def initial(platform, shapes):
        rng = np.random.default_rng(0)
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@fault("replicas-begin-apart", "initial", "all", "broadcasts")
class RoutersBeginApart(Layer):
    @staticmethod
    def initial(platform, shapes):
        rng = np.random.default_rng(platform.rank)
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------------------- a shared batch
class AllReduced(Layer):
    """Every rank has all tokens and computes its own experts; an all-reduce adds them up."""

    claims = Claims(batch="shared")

    def enter(self, x):
        return self.platform.copy_to_group(x)

    def leave(self, x):
        return self.platform.reduce_from_group(x)

    def __call__(self, m, x):
        chosen, scores = self.route(m, x)
        scores, x = self.enter(scores), self.enter(x)
        out = 0.0
        for e in range(self.local):
            weight = (scores * (chosen == e + self.rank * self.local)).sum(axis=1)[:, None]
            out = out + weight * swiglu(x, m.w1[e], m.w2[e], m.w3[e])
        return self.leave(out)

    @staticmethod
    def reduce(platform, gradients, claims):
        return gradients


@fault("lost", "router", "elsewhere", "sum over ranks is missing")
class SharedBatchPartialGradients(AllReduced):
    """The forward is right; what lies below gets the part of each rank's own experts, and drifts apart."""

    def enter(self, x):
        return x


@fault("scaled", "experts", "all", "all-reduce as its backward")
class SharedBatchSumsBack(AllReduced):
    """The all-reduce of the output has an all-reduce as its backward: everything is too large by the ranks."""

    def leave(self, x):
        return self.platform.copy_to_group(self.platform.reduce_from_group(x))
