# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer against plain NumPy, on loopback."""

import moe_cases
import pytest

from hyperep.loopback import run


@pytest.mark.parametrize("name", moe_cases.CONFIGS)
def test_layer_agrees_with_numpy(name):
    run(lambda platform: moe_cases.layer_agrees(platform, name), 1)


@pytest.mark.parametrize("name", ["softmax", "groups and bias", "shared", "capacity by probability", "deepseek-v3"])
def test_no_tokens(name):
    run(lambda platform: moe_cases.no_tokens(platform, name), 1)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_losses_agree_with_numpy(score_function):
    run(lambda platform: moe_cases.losses_agree(platform, score_function), 1)


def test_top_1_trains_the_router():
    run(moe_cases.top_1_trains_the_router, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_loss_is_that_of_all_ranks(ranks):
    run(moe_cases.global_loss_agrees, ranks)


def test_global_loss_is_that_of_its_mesh():
    run(lambda platform: moe_cases.global_loss_agrees(platform, others=2), 4)


def test_expert_bias_follows_the_load_of_its_group():
    run(moe_cases.bias_follows_the_load_of_its_group, 4)


def test_tokens_of_any_number_of_dims():
    run(moe_cases.tokens_of_any_number_of_dims, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_expert_bias_follows_the_load_of_all_ranks(ranks):
    run(moe_cases.bias_follows_the_load, ranks)


def test_expert_bias_balances():
    run(moe_cases.balance_by_bias, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["capacity by probability", "capacity by position"])
def test_capacity_under_expert_parallelism(name, ranks):
    run(lambda platform: moe_cases.capacity_under_expert_parallelism(platform, name), ranks)
