# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer on loopback; the cases themselves are neutral."""

import parity
import pytest

from hyperep.loopback import run

STYLED_GRID = [
    *(("ep", ep, 1) for ep in (1, 2, 4)),
    *(("tp", 1, tp) for tp in (1, 2, 4)),
    *(("etp", ep, tp) for ep, tp in parity.GRID),
    *(("partial", ep, tp) for ep, tp in parity.GRID),
]
REDUCING = [("tp", 1, 2), ("etp", 1, 2), ("etp", 2, 2)]


@pytest.mark.parametrize(("style", "ep", "tp"), STYLED_GRID)
@pytest.mark.parametrize("exchange", ["tokens", "rows"])
def test_sharded_layer_agrees_with_the_unsharded(exchange, style, ep, tp):
    run(lambda platform: parity.sharded_layer_agrees(platform, style, ep, tp, exchange), ep * tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
@pytest.mark.parametrize("case", [parity.backward_reduction_is_needed, parity.forward_reduction_is_needed])
def test_a_removed_reduction_is_noticed(case, style, ep, tp):
    run(lambda platform: case(platform, style, ep, tp), ep * tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_partial_output_sums_to_the_whole(style, ep, tp):
    run(lambda platform: parity.partial_output_sums_to_the_whole(platform, style, ep, tp), ep * tp)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_style_serves_two_layers(ranks):
    run(parity.one_style_serves_two_layers, ranks)


PUBLISHED = [
    *(("ep", 4, 1, config) for config in ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")),
    *(("etp", 2, 2, config) for config in ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")),
    ("tp", 1, 2, "deepseek-v3"),
    ("plan", 2, 2, "deepseek-v3"),
    ("plan", 1, 4, "deepseek-v3"),
]


@pytest.mark.parametrize(("style", "ep", "tp", "config"), PUBLISHED)
def test_layers_of_published_models_agree(style, ep, tp, config):
    run(lambda platform: parity.configured_layer_agrees(platform, style, ep, tp, config), ep * tp)


@pytest.mark.parametrize(("style", "ep", "tp", "chunks"), [("ep", 1, 1, 3), *parity.IN_CHUNKS])
def test_layers_in_chunks_agree(style, ep, tp, chunks):
    run(lambda platform: parity.configured_layer_agrees(platform, style, ep, tp, "deepseek-v3", chunks), ep * tp)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_pair_agrees(bias, ranks):
    run(lambda platform: parity.linear_pair_agrees(platform, bias), ranks)


def test_partial_rowwise_output_sums_to_the_whole():
    run(parity.partial_rowwise_output_sums_to_the_whole, 2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mean_of_means", [False, True])
def test_gradient_scale(mean_of_means, ranks):
    run(lambda platform: parity.gradient_scale(platform, mean_of_means), ranks)
