# SPDX-License-Identifier: Apache-2.0
"""Where an unknown cause lies, by what is right although it would be wrong if the cause lay elsewhere."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["narrowed"]

_PLACES = {
    ("experts", "tokens"): (
        "Outputs and the gradient of the router are right: it lies in the backward pass between the weighted sum and "
        "the experts, where cotangents are weighted, put in order and sent to the experts' ranks."
    ),
    ("tokens",): (
        "Outputs and the gradients of experts and router are right: it lies in the backward pass between the experts "
        "and the tokens, where gradients are sent back, put in order and added up over a token's choices."
    ),
    ("experts",): (
        "Outputs and the gradient of the tokens are right: it lies in what is done with the gradients of the experts' "
        "weights only, in their sums over rows, ranks and steps."
    ),
    ("router", "tokens"): (
        "Outputs and the gradients of the experts are right: it lies in the backward pass of the scores."
    ),
    ("router",): (
        "Outputs and the gradients of experts and tokens are right: it lies in what is done with the gradient of the "
        "router only, in its sums over tokens, ranks and steps."
    ),
}
"""All that is wrong -> where the cause must lie then."""


def narrowed(wrong: Collection[str]) -> str:
    """Where the cause lies if *wrong* quantities are wrong and all others are right; empty if that says nothing."""
    return _PLACES.get(tuple(sorted(wrong)), "")
