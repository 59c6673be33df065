# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: router, experts, and the layer around them."""

from hyperep.moe.balance import stepped_expert_bias, update_expert_bias
from hyperep.moe.config import LossCoefficients, MoEConfig, RouterConfig
from hyperep.moe.experts import GroupedExperts
from hyperep.moe.feed_forward import FeedForward
from hyperep.moe.layer import MoE, MoEStats, build_moe
from hyperep.moe.linear import Linear
from hyperep.moe.load import dropped_fraction, load_imbalance
from hyperep.moe.losses import (
    auxiliary_loss,
    global_load_balancing_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_load_balancing_loss,
)
from hyperep.moe.presets import PRESETS, Preset
from hyperep.moe.router import Routing, TopKRouter, build_router, route

__all__ = [
    "PRESETS",
    "FeedForward",
    "GroupedExperts",
    "Linear",
    "LossCoefficients",
    "MoE",
    "MoEConfig",
    "MoEStats",
    "Preset",
    "RouterConfig",
    "Routing",
    "TopKRouter",
    "auxiliary_loss",
    "build_moe",
    "build_router",
    "dropped_fraction",
    "global_load_balancing_loss",
    "load_balancing_loss",
    "load_imbalance",
    "route",
    "router_z_loss",
    "sequence_load_balancing_loss",
    "stepped_expert_bias",
    "update_expert_bias",
]
