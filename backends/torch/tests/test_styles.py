# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, scores and shards, on torch: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import score_cases
import style_cases


@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_keyword_arguments_reach_the_experts(two, style):
    two.run(style_cases.keyword_arguments_reach_the_experts, style)


def test_steps_can_be_overridden(two):
    two.run(style_cases.steps_can_be_overridden)


def test_a_deep_copy_hands_itself_to_the_steps(two):
    two.run(style_cases.a_deep_copy_hands_itself_to_the_steps)


def test_distribute_module_converts(two):
    two.run(style_cases.distribute_module_converts)


def test_shards_are_parts_of_the_first_ranks_tensor(four):
    four.run(style_cases.shards_are_parts_of_the_first_ranks_tensor)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "logsumexp"])
def test_scores_agree(platform, name):
    score_cases.scores_agree(platform, name)


def test_small_sigmoids_keep_their_digits(platform):
    score_cases.small_sigmoids_keep_their_digits(platform)
