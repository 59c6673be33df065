# SPDX-License-Identifier: Apache-2.0
"""What ``PlatformBase`` builds for authors, on MindSpore, beside what the platform has of its own."""

import sys
from pathlib import Path

import pytest

# Ranks look for programs where their parent does.
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import default_cases


@pytest.mark.parametrize("case", ["numbers", "identities", "sums_of_rows", "products"])
def test_default(platform, case):
    getattr(default_cases, case)(platform)


def test_default_among_four_ranks(four):
    four.run("default_cases:in_groups", {}, deadline=240.0)
