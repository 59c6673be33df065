# SPDX-License-Identifier: Apache-2.0
"""The expert bias stays float32 on the device whatever its layer is cast to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hyperep.moe import MoEConfig, RouterConfig, build_moe, update_expert_bias


@pytest.mark.parametrize("cast", [lambda layer: layer.to(torch.bfloat16), lambda layer: layer.half()])
def test_small_steps_are_kept(platform, cast):
    router = RouterConfig(num_experts=4, top_k=2, expert_bias=True)
    layer = build_moe(platform, MoEConfig(dim=8, hidden_dim=4, router=router))
    platform.assign(layer.router.expert_bias, platform.from_host(np.full(4, 2.0, np.float32)))
    layer = cast(layer)
    counts = platform.from_host(np.array([0, 4, 2, 2]))
    for _ in range(30):
        update_expert_bias(platform, layer, counts, 0.0009)
    assert layer.router.expert_bias.device.type == "npu"
    bias = platform.to_host(layer.router.expert_bias)[0]
    np.testing.assert_allclose(bias, [2.027, 1.973, 2.0, 2.0], atol=1e-5)
