# SPDX-License-Identifier: Apache-2.0
"""Scores on loopback."""

import pytest
import score_cases

from hyperep.loopback import run


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "logsumexp"])
def test_scores_agree(name):
    run(lambda platform: score_cases.scores_agree(platform, name), 1)


def test_small_sigmoids_keep_their_digits():
    run(score_cases.small_sigmoids_keep_their_digits, 1)
