# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, and what users may change in them, on loopback."""

import pytest
import style_cases

from hyperep.loopback import run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_keyword_arguments_reach_the_experts(style, ranks):
    run(lambda platform: style_cases.keyword_arguments_reach_the_experts(platform, style), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_can_be_overridden(ranks):
    run(style_cases.steps_can_be_overridden, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_deep_copy_hands_itself_to_the_steps(ranks):
    run(style_cases.a_deep_copy_hands_itself_to_the_steps, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_distribute_module_converts(ranks):
    run(style_cases.distribute_module_converts, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_parts_of_the_first_ranks_tensor(ranks):
    run(style_cases.shards_are_parts_of_the_first_ranks_tensor, ranks)
