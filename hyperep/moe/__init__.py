# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: router, experts, and the layer around them."""

from hyperep.moe.experts import GroupedExperts
from hyperep.moe.layer import MoE, MoEStats
from hyperep.moe.router import Routing, TopKRouter

__all__ = ["GroupedExperts", "MoE", "MoEStats", "Routing", "TopKRouter"]
