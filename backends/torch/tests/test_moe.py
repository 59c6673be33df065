# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer against plain NumPy, on torch: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import moe_cases


@pytest.mark.parametrize("name", moe_cases.CONFIGS)
def test_layer_agrees_with_numpy(platform, name):
    moe_cases.layer_agrees(platform, name)


@pytest.mark.parametrize("name", ["softmax", "groups and bias", "shared", "capacity by probability", "deepseek-v3"])
def test_no_tokens(platform, name):
    moe_cases.no_tokens(platform, name)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_losses_agree_with_numpy(platform, score_function):
    moe_cases.losses_agree(platform, score_function)


def test_global_loss_is_that_of_all_ranks(two):
    two.run(moe_cases.global_loss_agrees)


def test_expert_bias_follows_the_load_of_all_ranks(two):
    two.run(moe_cases.bias_follows_the_load)
