# SPDX-License-Identifier: Apache-2.0
"""What gradients would be if the backward pass had a fault that backward passes written by hand often have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.audit.reference import Terms

__all__ = ["Rivals", "rivals_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rivals:
    """Gradients due to one rank's tokens, by fault."""

    experts: Mapping[str, Mapping[str, np.ndarray]]
    """Fault -> weight of the experts -> its gradient."""
    router: Mapping[str, Mapping[str, np.ndarray]]
    """Fault -> ``"router"`` -> its gradient ``[E, D]``."""
    tokens: Mapping[str, np.ndarray]
    """Fault -> the gradient of the tokens ``[T, D]``; all faults of the other two among them."""


def rivals_of(terms: Terms) -> Rivals:
    """Put the backward pass together in every wrong way that is known."""
    way, order, combine = terms.backward, terms.order, terms.combine
    by_experts, by_router = terms.back_experts.sum(axis=0), terms.back_router.sum(axis=0)
    router: dict[str, np.ndarray] = {}
    experts: dict[str, Mapping[str, np.ndarray]] = {}
    tokens: dict[str, np.ndarray] = {}

    of_scores = {fault: _paired_anew(way.of_scores, order, pairing) for fault, pairing in _PAIRINGS.items()}
    of_scores[_SCORED] = way.of_scores * combine
    for fault, given in of_scores.items():
        of_router, of_tokens = way.through_scores(given)
        router[fault], tokens[fault] = of_router.sum(axis=0), of_tokens.sum(axis=0) + by_experts
    if way.undivided is not None:
        router[_UNDIVIDED], of_undivided = way.undivided(way.of_scores)
        tokens[_UNDIVIDED] = of_undivided + by_experts

    for fault, power in _POWERS.items():
        wrong = (combine**power * (combine != 0)).T[:, :, None]
        if terms.weighted_output:
            experts[fault], back = way.through_experts(wrong * way.cotangent[None])
        else:  # experts do not see in backward by what their inputs were multiplied
            back = way.of_inputs * wrong
        tokens[fault] = back.sum(axis=0) + by_router
    sort = np.argsort(order.ravel(), kind="stable")  # choices in the order of experts
    unsort = np.argsort(sort)
    experts[_UNSORTED], back = way.through_experts(_of_other_choices(way.weighted, order, unsort[unsort]))
    tokens[_UNSORTED] = (back * way.used.T[:, :, None]).sum(axis=0) + by_router
    tokens[_SORTED] = _of_other_choices(terms.back_experts, order, sort[sort]).sum(axis=0) + by_router
    return Rivals(
        experts=experts,
        router={fault: {"router": gradient} for fault, gradient in router.items()},
        tokens={fault: gradient + terms.back_shared for fault, gradient in tokens.items()},
    )


_UNDIVIDED = "normalisation of the scores is not differentiated"
_POWERS = {"scores are left out of the backward pass": 0, "scores are applied twice in the backward pass": 2}
"""Fault of the gradients of experts and tokens -> the power of the scores in it, which should be one."""
_UNSORTED = "cotangents are sorted by expert with the inverse of the permutation that sorts"
_SORTED = "gradients of rows are put back in the order of tokens with the permutation that sorts, and not its inverse"
_SCORED = "the gradients of the scores are multiplied by the scores"
"""What comes of results of experts that were kept for backward after they had been weighted, and not before."""

_PAIRINGS = {
    "the gradients of a token's scores are in the reverse order": lambda order: order[:, ::-1],
    "the gradients of a token's scores are in the order of its experts' numbers": lambda order: np.sort(order, axis=1),
    "the gradients of a token's scores are those of the next token": lambda order: None,
}
"""Fault -> the experts ``[T, K]`` whose scores get the gradients that the choices should get, one after the other."""


def _of_other_choices(rows: np.ndarray, order: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``[E, T, D]``: each choice with the row of another one, of ``order.ravel()``."""
    experts, tokens = order.ravel(), np.arange(order.size) // max(1, order.shape[1])
    found = np.zeros_like(rows)
    found[experts, tokens] = rows[experts[others], tokens[others]]
    return found


def _paired_anew(of_scores: np.ndarray, order: np.ndarray, pairing: Any) -> np.ndarray:
    values, found = np.take_along_axis(of_scores, order, axis=1), np.zeros_like(of_scores)
    receiving = pairing(order)
    if receiving is None:
        receiving, values = order, np.roll(values, -1, axis=0)
    np.put_along_axis(found, receiving, values, axis=1)
    return found
