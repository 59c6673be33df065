# SPDX-License-Identifier: Apache-2.0
"""Padding goes to nobody, costs nothing and counts nowhere, on torch: the core's neutral cases."""

import sys
from pathlib import Path

import pytest
import torch

from hyperep.moe import MoE

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import padding_cases


@pytest.mark.parametrize("name", padding_cases.NAMES)
def test_padding_goes_to_nobody(platform, name):
    padding_cases.padding_goes_to_nobody(platform, name)


def test_padding_goes_to_nobody_under_expert_parallelism(two):
    two.run(padding_cases.padding_goes_to_nobody, "softmax", True)


@pytest.mark.parametrize("name", ["softmax", "capacity by probability"])
def test_padding_is_not_sent(two, name):
    two.run(padding_cases.padding_is_not_sent, name)


def test_padding_costs_nothing(two):
    two.run(padding_cases.padding_costs_nothing, "softmax")


@pytest.mark.parametrize("name", ["groups and bias", "shared", "capacity by probability"])
def test_nothing_but_padding(platform, name):
    padding_cases.nothing_but_padding(platform, name)


def test_bias_is_moved_by_real_tokens(platform):
    padding_cases.bias_is_moved_by_real_tokens(platform)


def test_a_mask_of_integers_is_refused(platform):
    layer = MoE(platform, 8, 4, 4, 2)
    with pytest.raises(TypeError, match=r"mask is torch.int64; give a bool tensor"):
        layer(torch.ones(2, 3, 8), mask=torch.ones(2, 3, dtype=torch.int64))
