# SPDX-License-Identifier: Apache-2.0
"""What a layer claims to compute: the settings that the reference is made from, and against which it is judged.

Letters: ``E`` experts, ``L`` of one rank, ``R`` ranks, ``T`` tokens of a rank, ``K`` choices a token, ``D`` model
dimension, ``H`` hidden dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import autograd.numpy as anp

__all__ = ["RELU_MLP", "SWIGLU", "Claims", "Expert", "Sizes"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the layer that is audited: small, and no two numbers that a factor could equal by chance."""

    dim: int = 16
    """``D``; at least ``E + 2``, so that each expert's share of an output can be told from those of the others."""
    hidden: int = 8
    """``H``."""
    experts: int = 8
    """``E``; every number of ranks that is audited divides it."""
    top_k: int = 3
    """``K``."""

    def __post_init__(self) -> None:
        if self.dim < self.experts + 2:
            raise ValueError(f"dim={self.dim} must be at least experts + 2 = {self.experts + 2}; raise it")
        if not 1 <= self.top_k < self.experts:
            raise ValueError(f"top_k={self.top_k} must be at least 1 and below experts={self.experts}")
        if self.hidden < 2:
            raise ValueError(f"hidden={self.hidden} must be at least 2")

    def shape(self, letters: str) -> tuple[int, ...]:
        """The shape that *letters* (of ``E``, ``D``, ``H``) stand for."""
        return tuple({"E": self.experts, "D": self.dim, "H": self.hidden}[letter] for letter in letters)


@dataclass(frozen=True, kw_only=True)
class Expert:
    """The network of one expert."""

    shapes: Mapping[str, str]
    """Weight -> its dims as letters, ``{"w1": "HD"}``; the layer's weight has the expert, ``E``, before them."""
    forward: Callable[[Mapping[str, Any], Any], Any]
    """``forward(weights, rows [N, D]) -> [N, D]`` in ``autograd.numpy``, for one expert."""
    batched: bool = False
    """Whether *forward* also takes weights and rows that have further dims before these."""


def _swiglu(w: Mapping[str, Any], x: Any) -> Any:
    gate = _times(x, w["w1"])
    return _times(gate / (1 + anp.exp(-gate)) * _times(x, w["w3"]), w["w2"])


def _relu_mlp(w: Mapping[str, Any], x: Any) -> Any:
    hidden = anp.maximum(_times(x, w["w1"]) + w["b1"][..., None, :], 0)
    return _times(hidden, w["w2"]) + w["b2"][..., None, :]


def _times(x: Any, weight: Any) -> Any:
    return anp.matmul(x, anp.swapaxes(weight, -1, -2))


SWIGLU = Expert(shapes={"w1": "HD", "w2": "DH", "w3": "HD"}, forward=_swiglu, batched=True)
"""``(silu(x w1^T) * (x w3^T)) w2^T`` (arXiv:2002.05202)."""
RELU_MLP = Expert(shapes={"w1": "HD", "b1": "H", "w2": "DH", "b2": "D"}, forward=_relu_mlp, batched=True)
"""``relu(x w1^T + b1) w2^T + b2``."""

_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What is right for a layer. The defaults are those of a dropless layer with tokens of each rank's own."""

    sizes: Sizes = field(default_factory=Sizes)
    expert: Expert = SWIGLU
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits ``x router^T`` to the scores of all experts; the best ``K`` are chosen."""
    normalize: bool = True
    """Whether the chosen scores are divided by their sum; with softmax that is the softmax of the chosen logits."""
    scale: float = 1.0
    """Factor on the scores after that."""
    weighting: Literal["output", "input"] = "output"
    """Whether scores multiply what an expert returns, or the token that it gets."""
    shared: bool = False
    """Whether a shared expert of the same form is added for every token; its weights are ``shared_w1`` and so on."""
    batch: Literal["own", "shared"] = "own"
    """Whether every rank has tokens of its own, or all have the same."""
    reduction: Literal["sum", "mean"] = "sum"
    """Whether gradients are those of the sum of all ranks' losses, or of their mean. A shared batch has one loss."""
    replicated: Literal["reduced", "own"] = "reduced"
    """Gradients of parameters that every rank holds whole (router, shared expert): already the same on all ranks, or
    those of each rank's own tokens, because somebody else (a data-parallel wrapper) sums or averages them later."""
    capacity: float | None = None
    """``None``: dropless. Else an expert takes at most ``ceil(capacity * T * K / E)`` tokens of each rank."""
    drop: Literal["probability", "position"] = "probability"
    """Which tokens an expert that is over capacity keeps: those of the highest scores, or the first ones."""
    equal_tokens: bool = False
    """Whether all ranks must have equally many tokens. If so, unequal numbers are not tried."""
    empty_batches: bool = True
    """Whether a rank may be called with no token at all."""
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    """In which the layer computes."""
    initial: bool = True
    """Whether training begins with the weights that the layer is made with, where all ranks have the same seed."""
    deterministic: bool = True
    """Whether the same call gives the same bits."""

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity={self.capacity} must be above 0; None drops nothing")
        if self.precision not in _TOLERANCE:
            raise ValueError(f"precision={self.precision!r}: choose one of {', '.join(_TOLERANCE)}")
        if self.normalize and self.sizes.top_k == 1:
            raise ValueError("normalize=True with top_k=1 makes every score 1, so that the router learns nothing")

    @property
    def tolerance(self) -> float:
        """Relative error, in the Euclidean norm, from which on something is wrong."""
        return _TOLERANCE[self.precision]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by name, with its whole shape."""
        sizes, letters = self.sizes, self.expert.shapes
        found = {"router": sizes.shape("ED")}
        found |= {name: sizes.shape("E" + dims) for name, dims in letters.items()}
        return found | ({f"shared_{n}": sizes.shape(d) for n, d in letters.items()} if self.shared else {})

    def kind(self, name: str) -> str:
        """``"router"``, ``"experts"`` or ``"shared"``: what the weight *name* belongs to."""
        return "router" if name == "router" else "shared" if name.startswith("shared_") else "experts"
