# SPDX-License-Identifier: Apache-2.0
"""Padding goes to nobody, costs nothing and counts nowhere, on loopback."""

import numpy as np
import padding_cases
import pytest

from hyperep.loopback import LoopbackPlatform, run
from hyperep.moe import MoE, load_balancing_loss, sequence_load_balancing_loss


@pytest.mark.parametrize("name", padding_cases.NAMES)
def test_padding_goes_to_nobody(name):
    run(lambda platform: padding_cases.padding_goes_to_nobody(platform, name), 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["softmax", "capacity by probability"])
def test_padding_goes_to_nobody_under_expert_parallelism(name, ranks):
    run(lambda platform: padding_cases.padding_goes_to_nobody(platform, name, sharded=True), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["softmax", "capacity by probability"])
def test_padding_is_not_sent(name, ranks):
    run(lambda platform: padding_cases.padding_is_not_sent(platform, name), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_padding_costs_nothing(score_function, ranks):
    run(lambda platform: padding_cases.padding_costs_nothing(platform, score_function), ranks)


@pytest.mark.parametrize("name", padding_cases.NAMES)
def test_nothing_but_padding(name):
    run(lambda platform: padding_cases.nothing_but_padding(platform, name), 1)


def test_bias_is_moved_by_real_tokens():
    run(padding_cases.bias_is_moved_by_real_tokens, 1)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.ones((2, 3), np.int64), TypeError, r"mask is int64; give a bool tensor .*attention_mask != 0"),
        ([[True] * 3] * 2, TypeError, "mask is list; give a bool tensor"),
        (np.ones((2, 4), bool), ValueError, r"mask of shape \[2, 4\] for tokens of shape \[2, 3, 8\].*\[2, 3\]"),
        (np.ones((2, 1), bool), ValueError, r"mask of shape \[2, 1\]"),
    ],
)
def test_a_mask_that_is_none_is_told(mask, error, words):
    platform = LoopbackPlatform()
    layer = MoE(platform, 8, 4, 4, 2)
    with pytest.raises(error, match=words):
        layer(np.ones((2, 3, 8), np.float32), mask=mask)


def test_a_rank_without_sequences_has_no_loss():
    platform = LoopbackPlatform()
    layer = MoE(platform, 8, 4, 4, 2)
    stats = layer(np.ones((0, 3, 8), np.float32), with_stats=True)[1]
    assert stats.sequences == 0
    assert sequence_load_balancing_loss(platform, stats.routing, stats.sequences) == 0
    assert load_balancing_loss(platform, stats.routing) == 0
