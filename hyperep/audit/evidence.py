# SPDX-License-Identifier: Apache-2.0
"""Observed and expected, side by side, as linear problems: which terms must be counted how often to get what is there.

A gradient is a sum over ranks, choices and steps. Taken apart by the reference, its observed value tells how often each
term is in it: once if all is right, never if something is lost, twice if it is summed once too often. The same holds
for outputs, which are sums over choices. So a fault is seen as coefficients, and its cause as what the terms with wrong
coefficients have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hyperep.audit.claims import Claims
from hyperep.audit.expectation import Expectation, Expected, shares
from hyperep.audit.observation import Whole
from hyperep.audit.reference import Terms

__all__ = ["Block", "Label", "gradient_blocks", "output_blocks", "owner_of", "token_gradient_blocks"]


@dataclass(frozen=True, kw_only=True)
class Label:
    """Where a term comes from; ``None`` where that is mixed, or does not apply."""

    step: str | None = None
    """The batch whose backward pass it belongs to."""
    rank: int | None = None
    """Whose tokens."""
    owner: int | None = None
    """Which rank holds the expert."""
    expert: int | None = None
    slot: int | None = None
    """Which choice of the token, the best first."""
    way: str | None = None
    """``"experts"``, ``"router"`` or ``"shared"``: by which way it came."""
    viewer: int | None = None
    """Which rank sees it."""
    weight: str | None = None
    token: int | None = None
    place: int | None = None
    """How many tokens of the same rank chose the same expert before this one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One linear problem."""

    observed: np.ndarray
    """``[N]``."""
    vectors: np.ndarray
    """``[n, N]``: the terms."""
    right: np.ndarray
    """``[n]``: how often each belongs into it."""
    labels: tuple[Label, ...]

    @property
    def expected(self) -> np.ndarray:
        """``[N]``."""
        return self.right @ self.vectors


def owner_of(expert: int, claims: Claims, ranks: int) -> int:
    """The rank that is taken to hold an expert: equal shares in the order of ranks."""
    return expert // (claims.sizes.experts // ranks)


def output_blocks(claims: Claims, terms: Sequence[Terms], observed: Sequence[np.ndarray]) -> list[Block]:
    """A block a token: what its experts contribute, and the shared expert."""
    blocks = []
    for rank, (of_rank, output) in enumerate(zip(terms, observed, strict=True)):
        places = _places(of_rank)
        for t in range(len(of_rank.tokens)):
            chosen = of_rank.order[t]
            vectors, right, labels = list(of_rank.outputs[chosen, t]), list(of_rank.coefficients[t, chosen]), []
            for slot, e in enumerate(chosen):
                labels.append(
                    Label(
                        rank=rank,
                        owner=owner_of(int(e), claims, len(terms)),
                        expert=int(e),
                        slot=slot,
                        way="experts",
                        token=t,
                        place=int(places[t, slot]),
                    )
                )
            if claims.shared:
                vectors.append(of_rank.shared[t])
                right.append(1.0)
                labels.append(Label(rank=rank, way="shared", token=t))
            blocks.append(_block(output[t], vectors, right, labels))
    return blocks


def token_gradient_blocks(claims: Claims, terms: Sequence[Terms], observed: Sequence[np.ndarray]) -> list[Block]:
    """A block a token: its gradient by way of each expert, of the scores, and of the shared expert."""
    blocks = []
    for rank, (of_rank, gradient) in enumerate(zip(terms, observed, strict=True)):
        for t in range(len(of_rank.tokens)):
            vectors: list[np.ndarray] = []
            labels = []
            for slot, e in enumerate(of_rank.order[t]):
                owner = owner_of(int(e), claims, len(terms))
                for way, back in (("experts", of_rank.back_experts), ("router", of_rank.back_router)):
                    vectors.append(back[e, t])
                    labels.append(Label(rank=rank, owner=owner, expert=int(e), slot=slot, way=way, token=t))
            if claims.shared:
                vectors.append(of_rank.back_shared[t])
                labels.append(Label(rank=rank, way="shared", token=t))
            blocks.append(_block(gradient[t], vectors, [1.0] * len(vectors), labels))
    return blocks


def gradient_blocks(
    claims: Claims, kind: str, expectation: Expectation, expected: Expected, wholes: dict[str, Whole]
) -> list[Block]:
    """Blocks of the gradients of all weights of a *kind*: for experts one for each expert, weight and viewer."""
    blocks = []
    for name, whole in wholes.items():
        if claims.kind(name) != kind:
            continue
        ranks = len(next(iter(expectation.terms.values())))
        share = shares(claims, kind, ranks, whole.replicated)
        several = len(whole.views) > 1
        for viewer, view in enumerate(whole.views):
            about: dict[str, object] = {"weight": name, "viewer": viewer if several else None}
            for expert in range(len(view)) if kind == "experts" else [None]:
                vectors, right, labels = [], [], []
                for vector, part, label in _gradient_terms(claims, name, kind, expectation, expected, expert, about):
                    vectors.append(vector.ravel())
                    assert label.rank is not None
                    right.append(part * share[viewer, label.rank])
                    labels.append(label)
                slice_ = view if expert is None else view[expert]
                blocks.append(_block(slice_.ravel(), vectors, right, labels))
    return blocks


def _gradient_terms(
    claims: Claims,
    name: str,
    kind: str,
    expectation: Expectation,
    expected: Expected,
    expert: int | None,
    about: dict[str, object],
) -> Iterator[tuple[np.ndarray, float, Label]]:
    ranks = len(next(iter(expectation.terms.values())))
    for step in expected.batches:
        due = 0.0 if kind in expected.frozen else float(expected.due.count(step))
        for rank, terms in enumerate(expectation.terms[step]):
            gradient = terms.gradients[name]
            if kind == "router":
                for e in range(claims.sizes.experts):
                    owner = owner_of(e, claims, ranks)
                    yield gradient[e], due, Label(step=step, rank=rank, owner=owner, expert=e, way=kind, **about)  # type: ignore[arg-type]
            elif expert is not None:
                owner = owner_of(expert, claims, ranks)
                label = Label(step=step, rank=rank, owner=owner, expert=expert, way=kind, **about)  # type: ignore[arg-type]
                yield gradient[expert], due, label
            else:
                yield gradient, due, Label(step=step, rank=rank, way=kind, **about)  # type: ignore[arg-type]


def _places(terms: Terms) -> np.ndarray:
    """``[T, K]``: how many earlier tokens chose the same expert."""
    experts = terms.plain.shape[1]
    chosen = np.zeros((len(terms.tokens), experts), dtype=np.int64)
    np.put_along_axis(chosen, terms.order, 1, axis=1)
    return np.take_along_axis(np.cumsum(chosen, axis=0) - chosen, terms.order, axis=1)


def _block(
    observed: np.ndarray, vectors: Sequence[np.ndarray], right: Sequence[float], labels: Sequence[Label]
) -> Block:
    width = observed.size
    return Block(
        observed=np.asarray(observed, np.float64).ravel(),
        vectors=np.array([np.ravel(v) for v in vectors], np.float64).reshape(len(labels), width),
        right=np.array(right, np.float64),
        labels=tuple(labels),
    )
