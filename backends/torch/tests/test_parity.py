# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer between real gloo processes: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import parity
import replicas

STYLED_GRID = [
    *(("ep", ep, 1) for ep in (2, 4)),
    *(("tp", 1, tp) for tp in (2, 4)),
    *(("etp", ep, tp) for ep, tp in parity.GRID),
]
REDUCING = [("tp", 1, 2), ("etp", 1, 2)]


@pytest.mark.parametrize(("style", "ep", "tp"), STYLED_GRID)
@pytest.mark.parametrize("exchange", ["tokens", "rows"])
def test_sharded_layer_agrees_with_the_unsharded(request, exchange, style, ep, tp):
    ranks = request.getfixturevalue({2: "two", 4: "four"}[ep * tp])
    ranks.run(parity.sharded_layer_agrees, style, ep, tp, exchange)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_a_removed_backward_reduction_is_noticed(two, style, ep, tp):
    two.run(parity.backward_reduction_is_needed, style, ep, tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_a_removed_forward_reduction_is_noticed(two, style, ep, tp):
    two.run(parity.forward_reduction_is_needed, style, ep, tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_partial_output_sums_to_the_whole(two, style, ep, tp):
    two.run(parity.partial_output_sums_to_the_whole, style, ep, tp)


def test_one_style_serves_two_layers(two):
    two.run(parity.one_style_serves_two_layers)


@pytest.mark.parametrize("config", ["deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_layers_of_published_models_agree(four, config):
    four.run(parity.configured_layer_agrees, "plan" if config == "deepseek-v3" else "etp", 2, 2, config)


@pytest.mark.parametrize(("style", "ep", "tp", "chunks"), parity.IN_CHUNKS)
def test_layers_in_chunks_agree(request, style, ep, tp, chunks):
    ranks = request.getfixturevalue({2: "two", 4: "four"}[ep * tp])
    ranks.run(parity.configured_layer_agrees, style, ep, tp, "deepseek-v3", chunks)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_pair_agrees(two, bias):
    two.run(parity.linear_pair_agrees, bias)


def test_partial_rowwise_output_sums_to_the_whole(two):
    two.run(parity.partial_rowwise_output_sums_to_the_whole)


@pytest.mark.parametrize("mean_of_means", [False, True])
def test_gradient_scale(two, mean_of_means):
    two.run(parity.gradient_scale, mean_of_means)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("world", "style", "tp"), [("two", "ep", 1), ("four", "ep", 1), ("four", "etp", 2)])
def test_training_keeps_replicas_equal(request, world, style, tp, dtype):
    request.getfixturevalue(world).run(replicas.training_keeps_replicas_equal, style, tp, dtype)
