# SPDX-License-Identifier: Apache-2.0
"""The settings of a mixture-of-experts layer, as frozen records that are checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["LossCoefficients", "MoEConfig", "RouterConfig", "require_whole"]


def require_whole(name: str, value: Any) -> None:
    """Check that a setting is a whole number.

    Raises:
        ValueError: it is not.
    """
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts.

    Raises:
        ValueError: a value is out of its range, ``num_groups`` does not divide ``num_experts``, or one score is to be
            normalised alone.
    """

    num_experts: int
    """``E``."""
    top_k: int
    """``K``, experts per token."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """From logits to the scores of all experts; softmax is over all ``E``."""
    normalize: bool | None = None
    """Divide the chosen scores by their sum. With softmax that is the softmax over the chosen logits. Left out, it is
    true where there are several, and false for ``top_k=1``, as in Switch Transformer (arXiv:2101.03961, eq. 2)."""
    route_scale: float = 1.0
    """Factor on the chosen scores, after normalisation."""
    num_groups: int = 1
    """Experts form this many groups of neighbours (nodes, in DeepSeek-V3)."""
    top_groups: int = 1
    """A token may choose from its best ``top_groups`` groups only; a group's score is the sum of its two best."""
    expert_bias: bool = False
    """Add a bias per expert to the scores when experts are chosen, and not when they are weighted."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "num_groups", "top_groups"):
            require_whole(name, getattr(self, name))
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        if self.normalize is None:
            object.__setattr__(self, "normalize", self.top_k > 1)
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "normalize=True with top_k=1: one score divided by itself is 1 whatever the router says, so that the "
                "router would get no gradient; leave normalize out, or pass normalize=False, for the score itself"
            )
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function={self.score_function!r}: choose 'softmax' or 'sigmoid'")
        if not (self.route_scale > 0 and math.isfinite(self.route_scale)):
            raise ValueError(f"route_scale={self.route_scale} must be a positive number; 1.0 leaves scores as they are")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}; "
                "choose a divisor, or 1 for routing without groups"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} must be between 1 and num_groups={self.num_groups}")
        reachable = self.top_groups * self.num_experts // self.num_groups
        if reachable < self.top_k:
            raise ValueError(
                f"top_groups={self.top_groups} groups of {self.num_experts // self.num_groups} experts hold "
                f"{reachable}, fewer than top_k={self.top_k}; raise top_groups or lower top_k"
            )


@dataclass(frozen=True, kw_only=True)
class LossCoefficients:
    """Weights of the auxiliary losses; see :mod:`hyperep.moe.losses` for what each one is. Zero leaves it out.

    Raises:
        ValueError: one is negative or not finite.
    """

    batch: float = 0.0
    sequence: float = 0.0
    global_batch: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"loss coefficient {name}={value} must be a number from 0 on; 0 leaves the loss out")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts layer.

    Raises:
        ValueError: a size is below one, or ``capacity_factor`` is below one.
    """

    dim: int
    """``D``, the size of a token."""
    hidden_dim: int
    """``H`` of each routed expert."""
    router: RouterConfig
    num_shared_experts: int = 0
    """Experts that every token goes to; ``n`` of them are one feed-forward network of hidden size ``n * H``."""
    capacity_factor: float | None = None
    """``None``: dropless. Else an expert takes at most ``ceil(capacity_factor * T * K / E)`` rows of each rank."""
    drop_policy: Literal["probability", "position"] = "probability"
    """Which rows an expert that is over capacity keeps: those of the highest scores, or of the first tokens."""
    losses: LossCoefficients = field(default_factory=LossCoefficients)
    """What the model was trained with; the layer returns its routing, and the caller adds the losses to its own."""
    expert_bias_update_rate: float = 0.0
    """Step of the expert bias, for :func:`hyperep.moe.update_expert_bias`."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden_dim", "num_shared_experts"):
            require_whole(name, getattr(self, name))
        for name in ("dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} must be at least 0")
        if self.capacity_factor is not None and not 1 <= self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be at least 1, because below it rows are dropped even "
                "when all experts get the same number; choose 1.0 or more, or None to drop nothing"
            )
        if self.drop_policy not in ("probability", "position"):
            raise ValueError(f"drop_policy={self.drop_policy!r}: choose 'probability' or 'position'")

    def scaled_down(self, *, dim: int = 16, hidden_dim: int = 8, num_experts: int | None = None) -> MoEConfig:
        """The same routing on smaller sizes, for tests and examples; what does not fit is a ``ValueError``."""
        router = dataclasses.replace(self.router, num_experts=num_experts or self.router.num_experts)
        return dataclasses.replace(self, dim=dim, hidden_dim=hidden_dim, router=router)
