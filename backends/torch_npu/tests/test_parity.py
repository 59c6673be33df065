# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer, between real ranks of HCCL: the core's neutral cases."""

from __future__ import annotations

import pytest

GRID = [("ep", 2, 1), ("ep", 4, 1), ("tp", 1, 2), ("tp", 1, 4), ("etp", 2, 2)]


@pytest.mark.parametrize(("style", "ep", "tp"), GRID)
def test_sharded_layer_agrees_with_the_unsharded(pools, style, ep, tp):
    pools(ep * tp).run("parity:sharded_layer_agrees", {"style": style, "ep": ep, "tp": tp}, deadline=120)


@pytest.mark.parametrize("config", ["deepseek-v3", "mixtral-8x7b"])
def test_layers_of_published_models_agree(pools, config):
    case = {"style": "plan" if config == "deepseek-v3" else "etp", "ep": 2, "tp": 2, "config": config}
    pools(4).run("parity:configured_layer_agrees", case, deadline=120)


def test_one_style_serves_two_layers(pools):
    pools(2).run("parity:one_style_serves_two_layers", {}, deadline=60)


@pytest.mark.parametrize(("ranks", "style", "tp"), [(2, "ep", 1), (4, "etp", 2)])
def test_training_keeps_replicas_equal(pools, ranks, style, tp):
    pools(ranks).run("replicas:training_keeps_replicas_equal", {"style": style, "tp": tp}, deadline=120)
