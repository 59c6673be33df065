# SPDX-License-Identifier: Apache-2.0
"""Padding goes to nobody, costs nothing and counts nowhere, on Ascend: the core's neutral cases."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["softmax", "capacity by probability"])
def test_padding_goes_to_nobody(platform, name):
    import padding_cases

    padding_cases.padding_goes_to_nobody(platform, name)


def test_padding_is_not_sent(pools):
    pools(2).run("padding_cases:padding_is_not_sent", {"name": "softmax"}, deadline=120)


def test_padding_costs_nothing(pools):
    pools(2).run("padding_cases:padding_costs_nothing", {"score_function": "softmax"}, deadline=120)
