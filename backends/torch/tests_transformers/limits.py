# SPDX-License-Identifier: Apache-2.0
"""What cannot be had, and whose limit that is: where it ends, a test fails, and a line goes."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LIMITS", "Limit", "limit_of"]


@dataclass(frozen=True)
class Limit:
    """Cells of the matrix that are empty."""

    why: str
    """For the page."""
    told: str
    """What the error says, as a pattern."""
    checks: tuple[str, ...] = ()
    """Of which columns; none for all."""
    architectures: tuple[str, ...] = ()
    """Of which rows; none for all."""
    door: str = ""
    """Through which door; none for both."""

    def holds(self, check: str, architecture: str, door: str) -> bool:
        """Whether it stands in the way of a check."""
        return (
            (not self.checks or check in self.checks)
            and (not self.architectures or architecture in self.architectures)
            and self.door in ("", door)
        )


LIMITS = (
    Limit(
        "transformers has no plan by which it would spread these, so that there is no first door",
        "has no `ep_plan`",
        architectures=("dbrx", "jetmoe", "llama4_text", "longcat_flash"),
        door="inside transformers",
    ),
    Limit(
        "transformers computes no auxiliary loss for them",
        "Lacking: transformers computes no auxiliary loss",
        checks=("auxiliary loss",),
        architectures=(
            *("afmoe", "aria_text", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe"),
            *("glm4_moe_lite", "hunyuan_v1_moe", "hy_v3", "llama4_text", "longcat_flash", "mimo_v2_flash"),
            *("nemotron_h", "solar_open"),
        ),
    ),
    Limit(
        "JetMoE knows no gradient checkpointing in transformers",
        "does not support activation checkpointing",
        checks=("checkpointing",),
        architectures=("jetmoe",),
    ),
    Limit(
        "weights are kept in another shape than the files have, and are loaded whole: refused by name",
        "in another shape than its files",
        checks=("read by owners",),
        architectures=("dbrx", "longcat_flash"),
    ),
    Limit(
        "DBRX's weights are matrices of all experts, and peft's adapters for them are no experts' own",
        "Lacking: weights without a dim for the expert",
        checks=("LoRA on experts",),
        architectures=("dbrx",),
    ),
    Limit(
        "adapters on experts of these forms are not spread: refused by name",
        "not spread for experts of its form",
        checks=("LoRA on experts",),
        architectures=("jetmoe", "llama4_text", "longcat_flash"),
    ),
    Limit(
        "peft cannot add adapters of whole weights to FSDP2's DTensors; with transformers' own exchange neither",
        "got mixed torch.Tensor and DTensor",
        checks=("LoRA on experts",),
        door="inside transformers",
    ),
)


def limit_of(check: str, architecture: str, door: str, told: str = "") -> Limit | None:
    """The limit that stands in the way; if an error is given, the one that it tells of."""
    holding = [limit for limit in LIMITS if limit.holds(check, architecture, door)]
    return next((limit for limit in holding if not told or re.search(limit.told, told)), None)
