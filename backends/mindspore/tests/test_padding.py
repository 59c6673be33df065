# SPDX-License-Identifier: Apache-2.0
"""Padding goes to nobody, costs nothing and counts nowhere, on MindSpore: the core's neutral cases."""

import sys
from pathlib import Path

import pytest

# Ranks look for programs where their parent does.
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import padding_cases

DEADLINE = 240.0


@pytest.mark.parametrize("name", ["softmax", "capacity by probability"])
def test_padding_goes_to_nobody(platform, name):
    padding_cases.padding_goes_to_nobody(platform, name)


def test_padding_is_not_sent(two):
    two.run("padding_cases:padding_is_not_sent", {"name": "softmax"}, deadline=DEADLINE)


def test_padding_costs_nothing(two):
    two.run("padding_cases:padding_costs_nothing", {"score_function": "softmax"}, deadline=DEADLINE)


def test_nothing_but_padding(platform):
    padding_cases.nothing_but_padding(platform, "groups and bias")
