# SPDX-License-Identifier: Apache-2.0
"""What is expected: the actions of an examination carried out on the reference, with every sum left open."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperep.audit.claims import Claims
from hyperep.audit.on_rank import layer_of
from hyperep.audit.optimizers import Moments, optimizer_step
from hyperep.audit.reference import Terms, terms_of

__all__ = ["Expectation", "Expected", "expect", "shares"]

Weights = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What one read of a layer's gradients should show."""

    due: tuple[str, ...]
    """Batches whose gradients were added since they were forgotten last."""
    frozen: frozenset[str]
    """Kinds of parameters without gradients."""
    batches: tuple[str, ...]
    """All batches that went backward up to now, those of earlier steps and other layers too."""


@dataclass(kw_only=True, eq=False)
class Expectation:
    """What an examination should show, by the labels of :mod:`hyperep.audit.on_rank`."""

    terms: dict[str, tuple[Terms, ...]] = field(default_factory=dict)
    """Batch -> the layer taken apart, for each rank."""
    gradients: dict[str, Expected] = field(default_factory=dict)
    """Label -> which gradients were read."""
    weights: dict[str, tuple[Weights, Weights]] = field(default_factory=dict)
    """Label -> weights, and those that the layer had begun with."""
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    """Label -> what is expected under ``""``, and what known faults would give."""
    rivals: dict[str, dict[str, Weights]] = field(default_factory=dict)
    """Label of weights -> known fault -> what it would leave."""


@dataclass(kw_only=True, eq=False)
class _Layer:
    weights: Weights
    begun: Weights
    moments: Moments = field(default_factory=Moments)
    due: list[str] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    source: Weights | None = None
    """The weights that were loaded, and ..."""
    before: _Layer | None = None
    """... the layer before that."""


def expect(
    claims: Claims,
    actions: Sequence[Sequence[str]],
    weights: Sequence[Weights],
    tokens: Mapping[str, Sequence[np.ndarray]],
    cotangents: Mapping[str, Sequence[np.ndarray]],
    optimizer: Mapping[str, Any] | None,
) -> Expectation:
    """Carry out *actions* on the reference; *optimizer* is what the layer says of its own."""
    found = Expectation()
    layers = [_Layer(weights=dict(each), begun=dict(each)) for each in weights]
    homes: dict[str, _Layer] = {}
    met: list[str] = []
    for verb, *objects in actions:
        if verb == "forward":
            batch = objects[0]
            layer = layers[int(objects[2] if len(objects) > 2 else layer_of(batch))]
            each = zip(tokens[batch], cotangents[batch], strict=True)
            found.terms[batch] = tuple(terms_of(claims, layer.weights, x, g) for x, g in each)
            homes[batch] = layer
        elif verb == "backward":
            homes[objects[0]].due.append(objects[0])
            met.append(objects[0])
        elif verb == "zero":
            for layer in layers:
                layer.due.clear()
        elif verb == "freeze":
            for layer in layers:
                layer.frozen.add(objects[0])
        elif verb == "gradients":
            layer = layers[int(objects[1]) if len(objects) > 1 else 0]
            found.gradients[objects[0]] = Expected(
                due=tuple(layer.due), frozen=frozenset(layer.frozen), batches=tuple(dict.fromkeys(met))
            )
        elif verb == "step":
            layer = layers[int(objects[0]) if objects else 0]
            gradients = _summed(claims, found, layer.due)
            layer.weights, layer.moments = optimizer_step(optimizer or {}, layer.weights, gradients, layer.moments)
        elif verb == "weights":
            layer = layers[int(objects[1]) if len(objects) > 1 else 0]
            found.weights[objects[0]] = (layer.weights, layer.begun)
            found.rivals[objects[0]] = _rivals(claims, found, layer, optimizer)
        elif verb == "load":
            number, source = int(objects[0]), layers[0]
            layers[number] = _Layer(
                weights=dict(source.weights),
                begun=layers[number].begun,
                moments=copy.deepcopy(source.moments),
                source=dict(source.weights),
                before=layers[number],
            )
        elif verb == "norm":
            found.norms[objects[0]] = _norms(claims, _summed(claims, found, layers[0].due), len(tokens["a"]))
    return found


def shares(claims: Claims, kind: str, ranks: int, replicated: bool) -> np.ndarray:
    """``[V, R]``: how much of each rank's gradient belongs into what rank ``v`` sees."""
    if claims.batch == "shared":
        return np.full((ranks, ranks), 1.0 / ranks)  # every rank's tokens are the same, and count once
    if replicated and claims.replicated == "own":
        return np.eye(ranks)
    return np.full((ranks, ranks), 1.0 if claims.reduction == "sum" else 1.0 / ranks)


def _summed(claims: Claims, found: Expectation, due: Sequence[str]) -> Weights:
    """The gradients that the optimizer should see."""
    total: Weights = {}
    for batch in due:
        ranks = len(found.terms[batch])
        share = shares(claims, "", ranks, False)[0]
        for terms, part in zip(found.terms[batch], share, strict=True):
            for name, gradient in terms.gradients.items():
                whole = gradient.sum(axis=0) if name == "router" else gradient
                total[name] = total.get(name, 0.0) + part * whole
    return total


def _norms(claims: Claims, gradients: Weights, ranks: int) -> dict[str, float]:
    squares = {name: float((gradient**2).sum()) for name, gradient in gradients.items()}
    experts = {name: (gradients[name] ** 2).reshape(ranks, -1).sum(axis=1) for name in claims.expert.shapes}
    local = np.sum(list(experts.values()), axis=0)
    dense = sum(square for name, square in squares.items() if claims.kind(name) != "experts")
    everything = float(local.sum()) + dense
    found = {
        "": everything,
        "experts are omitted": dense,
        "replicas are counted once for each rank": float(local.sum()) + ranks * dense,
        "experts are counted once for each rank": ranks * float(local.sum()) + dense,
        "only the dense parameters are omitted": float(local.sum()),
        "it is squared": everything**2,
        "everything is counted once for each rank": ranks * everything,
    }
    found |= {f"only the experts of rank {rank} are in it": dense + float(local[rank]) for rank in range(ranks)}
    return {fault: float(np.sqrt(square)) for fault, square in found.items()}


def _rivals(
    claims: Claims,
    found: Expectation,
    layer: _Layer,
    optimizer: Mapping[str, Any] | None,
) -> dict[str, Weights]:
    """What known faults would have made of the weights."""
    rivals: dict[str, Weights] = {"unchanged": layer.begun}
    weights, before = layer.source, layer.before
    if weights is None or before is None:
        return rivals
    gradients = _summed(claims, found, layer.due) if layer.due else None
    fresh, stale = Moments(), before.moments
    for fault, moments in (("the optimizer's moments begin anew", fresh), ("moments of before the load", stale)):
        if gradients is not None:
            rivals[fault] = optimizer_step(optimizer or {}, weights, gradients, moments)[0]
    kept = {name: before.weights[name] if claims.kind(name) == "experts" else weights[name] for name in weights}
    rivals["the experts are not those of the checkpoint"] = kept
    return rivals
