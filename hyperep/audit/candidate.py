# SPDX-License-Identifier: Apache-2.0
"""``Candidate``: one possible cause of a deviation; ``Deviation``: what is wrong in one examination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hyperep.audit.claims import Claims

__all__ = ["QUANTITIES", "Candidate", "Deviation", "factor_names"]

QUANTITIES = {
    "run": "the run",
    "input": "the tokens that the layer was given",
    "output": "the output",
    "tokens": "the gradient of the tokens",
    "experts": "the gradients of the experts",
    "router": "the gradient of the router",
    "shared": "the gradients of the shared expert",
    "bits": "the bits of two equal runs",
    "norm": "the norm of all gradients",
    "weights": "the weights",
    "initial": "the initial weights",
    "memory": "the memory kept",
}
"""What may be wrong -> how it is called. Those further up explain those below, never the other way round."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cause that would explain a deviation."""

    cause: str
    """One of ``causes.py``."""
    quantity: str
    """One of :data:`QUANTITIES`."""
    where: str = "all"
    """What the wrong terms have in common; see ``patterns.py``."""
    values: tuple[object, ...] = ()
    factor: float | None = None
    names: tuple[str, ...] = ()
    """What the factor equals, its own value last."""
    detail: str = ""
    """What was fitted, in words, where the cause itself does not say it."""
    cost: float = 1.0
    """How far-fetched it is: of two that explain the same, the cheaper is the likelier."""
    residual: float = 0.0
    """What it leaves unexplained, relative."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One quantity of one examination that is not as expected."""

    quantity: str
    error: float
    """The worst relative error; infinite for what is not finite."""
    candidates: tuple[Candidate, ...]
    facts: Mapping[str, object] = field(default_factory=dict)


def factor_names(factor: float | None, claims: Claims, ranks: int) -> tuple[str, ...]:
    """Everything about the layer that *factor* equals within a percent, then its value."""
    if factor is None:
        return ("",)
    sizes = claims.sizes
    known = {"0": 0.0, "-1": -1.0}
    if ranks > 1:
        known |= {"R": ranks, "1/R": 1 / ranks, "R^2": ranks**2, "1/R^2": 1 / ranks**2}
        known |= {"L": sizes.experts / ranks, "1/L": ranks / sizes.experts}
    if sizes.top_k > 1:
        known |= {"K": sizes.top_k, "1/K": 1 / sizes.top_k}
    known |= {"E": sizes.experts, "1/E": 1 / sizes.experts}
    close = 0.01 if claims.precision in ("float32", "float64") else 0.05
    names = [name for name, value in known.items() if abs(factor - value) <= close * max(abs(value), 0.02)]
    return (*names, f"{factor:.3f}".rstrip("0").rstrip("."))
