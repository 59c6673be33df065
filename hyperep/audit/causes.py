# SPDX-License-Identifier: Apache-2.0
"""The causes that the audit knows, and how it tells them."""

from __future__ import annotations

from collections.abc import Sequence

from hyperep.audit.candidate import QUANTITIES, Candidate
from hyperep.audit.claims import Claims

__all__ = ["sentence"]

_FACTORS = {
    "R": "the number of ranks",
    "1/R": "one over the number of ranks",
    "R^2": "the square of the number of ranks",
    "1/R^2": "one over the square of the number of ranks",
    "L": "the number of experts of a rank",
    "1/L": "one over the number of experts of a rank",
    "K": "the number of choices of a token",
    "1/K": "one over the number of choices of a token",
    "E": "the number of experts",
    "1/E": "one over the number of experts",
    "-1": "the sign is wrong",
}


def sentence(candidate: Candidate, quantities: Sequence[str], claims: Claims) -> tuple[str, str]:
    """What is seen, and what is likely wrong; the second may be empty."""
    what = _join([QUANTITIES[quantity] for quantity in quantities])
    many = len(quantities) > 1 or what.startswith("the gradients") or what.startswith("the weights")
    is_, has = ("are", "have") if many else ("is", "has")
    cause = candidate.cause
    if cause in ("lost", "scaled", "extra"):
        return _counted(candidate, quantities, what, is_, claims)
    if cause == "stale":
        text = f"{what} {is_} that of batch {_join(list(map(str, candidate.values)))}, and not of this one"
        return _capital(text), "The gradient of another step or layer is read before this one's is there."
    seen, why = _TOLD[cause]
    if cause == "raised" and _at(candidate) == "backward" and "split" in candidate.detail.lower():
        why = (
            "The backward pass of an exchange sends what the forward pass received, and receives what it sent: its "
            "splits are those of the forward pass, exchanged."
        )
    values = ", ".join(map(str, candidate.values))
    text = seen.format(what=what, is_=is_, has=has, values=values, detail=candidate.detail, at=_at(candidate))
    return _capital(text), why.format(values=values, detail=candidate.detail)


def _at(candidate: Candidate) -> str:
    return candidate.names[0] if candidate.names else ""


_TOLD: dict[str, tuple[str, str]] = {
    "hung": (
        "the ranks wait for one another in {at}, and do not come to its end",
        "A rank does not issue a collective that the others wait for: an early return or a graph without history where "
        "it has nothing to send or receive, or another order of collectives.",
    ),
    "hung-alone": ("the layer does not come to the end of {at}", ""),
    "died": ("a rank dies: {detail}", ""),
    "raised": ("the layer raises in {at}: {detail}", ""),
    "shape": ("{what} {has} the wrong shape: {detail}", ""),
    "not-finite": (
        "{what} {has} NaN or infinity: {detail}",
        "Rows that nobody wrote: memory that was allocated and not filled where no token arrives, or padding that is "
        "read; or a division by a count of zero.",
    ),
    "unknown": (
        "{what} {is_} wrong, and no known cause explains it",
        "",  # but see narrow.py
    ),
    "absent": (
        "{what} {is_} absent (None) where tokens are: {values}",
        "The graph is cut: detach, no_grad, an integer or in-place operation, or a collective that autograd does not "
        "know, on the way from the loss.",
    ),
    "absent-without-tokens": (
        "experts without tokens have no gradient (None) where it must be zero: {values}",
        "A loop over experts skips those without rows. Optimizers then skip their weight decay and moments, and "
        "reductions of gradients, which other ranks take part in, hang or pair the wrong tensors.",
    ),
    "gradient-without-tokens": (
        "experts that no token has chosen have a gradient that is not zero: {values}",
        "Unwritten memory of a grouped kernel for groups of size zero, dummy tokens that are computed, or padding.",
    ),
    "rows-exchanged": (
        "{what} {is_} in the wrong order: {detail}",
        "Rows come back in another order than they were sent in: the inverse of the permutation is not the one that "
        "was applied, or splits of another call were used.",
    ),
    "experts-exchanged": (
        "experts are exchanged in {what}: {detail}",
        "The order of experts on the ranks is another than the order by which tokens are sent or weights are laid out.",
    ),
    "weights-exchanged": ("weights are exchanged in {what}: {detail}", "Layouts of fused or renamed weights differ."),
    "scores-exchanged": (
        "scores are paired with the wrong experts: a choice is weighted with {detail}",
        "Tokens are sorted by expert and their scores are not, or are sorted differently.",
    ),
    "scores-formula": ("scores are {detail}, against the claim", ""),
    "backward-formula": (
        "{what} {is_} wrong because {detail}",
        "In a backward pass written by hand; autograd would not do so.",
    ),
    "replicas-differ": ("{what}, which every rank holds, {is_} not the same on all ranks", ""),
    "frozen": ("frozen parameters get a gradient: {what}", ""),
    "input-changed": (
        "the layer changes the tokens that it was given",
        "An operation in place on its argument, or a result that is a view of it.",
    ),
    "not-deterministic": (
        "two equal runs give different bits: {detail}",
        "A sum whose order is left to chance (scatter-add, atomics), or chance in the routing.",
    ),
    "norm-formula": (
        "the norm of all gradients is wrong: {detail}",
        "Sharded and replicated gradients need different sums: squares of sharded ones are added over ranks, those of "
        "replicated ones are not.",
    ),
    "weights-formula": ("the weights are wrong: {detail}", ""),
    "weights-differ": ("{what} {is_} not what they should be: {detail}", ""),
    "replicas-drift": (
        "weights that every rank holds become different on different ranks: {detail}",
        "Each rank updates them by its own gradient.",
    ),
    "initial-alike-on-ranks": (
        "experts of different ranks begin with the same weights: {detail}",
        "Every rank draws its experts from the same seed. The audit sets one for all before it calls make: if training "
        "gives each rank a seed of its own, do so in make.",
    ),
    "initial-alike": ("experts begin with the same weights: {detail}", "One expert is drawn and then copied."),
    "replicas-begin-apart": (
        "{detail}, which every rank holds, begins with different weights on different ranks",
        "Each rank draws it from a seed of its own, and nobody broadcasts it.",
    ),
    "memory-kept": (
        "tokens are kept after the step: {detail}",
        "Something of the call is kept on the module, or in a list that nobody empties.",
    ),
}


def _counted(candidate: Candidate, quantities: Sequence[str], what: str, is_: str, claims: Claims) -> tuple[str, str]:
    """Where terms are counted too often, or not at all."""
    where, kind = candidate.where, candidate.cause
    if where == "all" and kind == "lost":
        return _capital(f"{what} {is_} zero"), _WHY_ZERO.get(quantities[0], "")
    if where == "all" and kind == "scaled" and candidate.factor is not None:
        large = "too large" if abs(candidate.factor) > 1 else "of what they should be" if is_ == "are" else ""
        times = f"{candidate.factor:.3f} times" + (f" {large}" if large == "too large" else " what is right")
        every = " on all experts" if quantities == ["experts"] else ""
        return _capital(f"{what} {is_} {times}{every}{_equals(candidate)}"), _why_scaled(candidate, quantities, claims)
    terms = _terms(candidate, claims)
    if kind == "lost":
        text = f"{terms} contribute nothing to {what}"
    elif kind == "extra":
        times = (
            "" if candidate.factor is None or abs(candidate.factor - 1) < 0.05 else f", {candidate.factor:.3f} times"
        )
        text = f"{what} also {'contain' if is_ == 'are' else 'contains'} {terms}, which do not belong there{times}"
    elif candidate.factor is None:
        text = f"{terms} have wrong weights in {what}"
    else:
        text = f"{terms} count {candidate.factor:.3f} times in {what}{_equals(candidate)}"
    return _capital(text), _why_counted(candidate, quantities, claims)


def _terms(candidate: Candidate, claims: Claims) -> str:
    values = _join([str(value) for value in candidate.values])
    plural = "s" if len(candidate.values) > 1 else ""
    if candidate.where == "way":
        names = {"experts": "the routed experts", "router": "the router's scores", "shared": "the shared expert"}
        return _join([names[str(value)] for value in candidate.values]) + " (as a way of the gradient)"
    if candidate.where == "way+exchanged":
        return "the experts on other ranks than the token's"
    if "+" in candidate.where:
        first, second = candidate.where.split("+")
        pairs = [
            " and ".join(map(" ".join, zip((first, second), map(str, pair), strict=True)))
            for pair in _tuples(candidate)
        ]
        return f"terms of {_join(pairs)}"
    if candidate.where == "step":
        return f"batch{'es' * (len(candidate.values) > 1)} {values}"
    return {
        "all": "terms",
        "exchanged": "experts on other ranks than the token's"
        if candidate.quantity in ("output", "tokens")
        else "tokens that come from other ranks",
        "others": "the tokens of other ranks",
        "elsewhere": "experts of other ranks",
        "slot": f"the choice{plural} number {values}",
        "weight": f"the weight{plural} {values}",
        "rank": f"the tokens of rank{plural} {values}",
        "owner": f"the experts of rank{plural} {values}",
        "viewer": f"the parts of rank{plural} {values}",
        "expert": f"expert{plural} {values}",
        "place": f"an expert's tokens from number {values} on",
    }[candidate.where]


def _tuples(candidate: Candidate) -> list[tuple[object, ...]]:
    return [value for value in candidate.values if isinstance(value, tuple)]


_WHY_ZERO = {
    "router": "Scores are detached, or applied where autograd does not follow, or a single score is divided by itself.",
    "experts": "The way from the loss to the experts is cut: an exchange without a backward pass.",
    "tokens": "The way from the loss to the tokens is cut: an exchange without a backward pass.",
    "output": "What is combined never receives what the experts return.",
}


def _why_scaled(candidate: Candidate, quantities: Sequence[str], claims: Claims) -> str:
    names, several = set(candidate.names), len(quantities) > 1
    if claims.batch == "shared" and "R" in names:
        return (
            "With a shared batch every rank holds the whole gradient already, and somebody adds it up over ranks once "
            "more; or the forward all-reduce has an all-reduce as its backward."
        )
    if several and "R" in names:
        return "The backward pass of a collective sums over ranks what is whole already; everything below it is larger."
    if "R" in names and claims.reduction == "mean":
        return "Summed over ranks, and not averaged as claimed."
    if "R" in names:
        return "Summed over ranks once more: the exchange has brought every rank's tokens there already."
    if "1/R" in names and claims.reduction == "sum":
        return (
            "Averaged over ranks, and not summed as claimed: a data-parallel mean runs over ranks that hold different "
            "experts, or over the wrong group."
        )
    if "1/R" in names:
        return "Averaged over ranks once more than claimed."
    if "K" in names or "1/K" in names:
        return "A sum over a token's choices where a mean is meant, or the other way round."
    return ""


def _why_counted(candidate: Candidate, quantities: Sequence[str], claims: Claims) -> str:
    where, kind, quantity = candidate.where, candidate.cause, quantities[0]
    if where == "step":
        return (
            "A gradient of an earlier step is still there, or is written where it should be added."
            if kind != "scaled"
            else "Accumulated gradients are scaled or reduced again with each backward pass."
        )
    if where == "others" and kind == "lost":
        return "Each rank has the gradient of its own tokens only: nobody reduces it, and replicas drift apart."
    if where == "rank" and quantity in ("router", "shared") and kind == "lost":
        return "The gradient of some ranks is taken for that of all: a broadcast, or a reduction over the wrong group."
    if where in ("exchanged", "owner", "elsewhere", "way+exchanged") and kind == "lost":
        if quantity == "output":
            return "What other ranks compute does not come back, or is not added."
        if claims.batch == "shared":
            return "Each rank has the part of its own experts only: the sum over ranks is missing in the backward pass."
        return "The exchange between ranks passes no gradient: a collective that autograd does not know."
    if where == "place":
        return "A buffer or a capacity of fixed size: what is beyond is dropped without a word."
    if where == "way" and "router" in candidate.values and kind == "lost":
        return "Scores are detached, or the router's input is."
    if where == "way" and "shared" in candidate.values and "R" in candidate.names:
        return "The shared expert is added on every rank before a sum over ranks."
    if where == "way" and "R" in candidate.names:
        return "That part is summed over ranks although every rank has all of it."
    return ""


def _equals(candidate: Candidate) -> str:
    said = [_FACTORS[name] for name in candidate.names if name in _FACTORS]
    return f", which is {' or '.join(said)}" if said else ""


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
