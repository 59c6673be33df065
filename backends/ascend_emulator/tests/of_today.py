# SPDX-License-Identifier: Apache-2.0
"""A layer with a capacity, forward and backward, and what else the adapter makes of operators: a program of its own."""

from __future__ import annotations

import numpy as np

import hyperep
from hyperep.moe import MoEConfig, RouterConfig, build_moe


def main() -> None:
    """Say a number at the end that depends on all of it."""
    platform = hyperep.get_platform("mindspore")
    xp = platform.xp
    config = MoEConfig(
        dim=4, hidden_dim=6, router=RouterConfig(num_experts=8, top_k=2), num_shared_experts=1, capacity_factor=1.0
    )
    layer = build_moe(platform, config)
    x = platform.from_host(np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32))
    weights = list(platform.parameters(layer).values())
    out, pullback = platform.vjp(layer, x, parameters=weights)
    results = [out, *pullback(xp.ones(out.shape))]
    counts = xp.full((4,), 3, dtype=xp.int64)
    results += [xp.stack([counts, platform.arange(4)], axis=1), xp.astype(counts, xp.int64)]
    results += [xp.take(x, xp.argsort(x[0, :]), axis=1), platform.all_to_all_single(counts)]
    platform.assign(weights[0], platform.stop_gradient(weights[0]) + 1.0)
    print(sum(float(np.abs(array).sum()) for array in platform.to_host(*results, weights[0])))


if __name__ == "__main__":
    main()
