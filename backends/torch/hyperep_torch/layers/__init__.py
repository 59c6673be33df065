# SPDX-License-Identifier: Apache-2.0
"""The core's layers as classes of PyTorch: made on any device, ``meta`` too, in the default dtype, and picklable."""

from hyperep_torch.layers.experts import GroupedExperts
from hyperep_torch.layers.feed_forward import FeedForward
from hyperep_torch.layers.moe import MoE
from hyperep_torch.layers.router import TopKRouter

__all__ = ["FeedForward", "GroupedExperts", "MoE", "TopKRouter"]
