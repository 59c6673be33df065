# SPDX-License-Identifier: Apache-2.0
"""What ``PlatformBase`` builds for authors, on torch, beside what the platform has of its own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import default_cases


@pytest.mark.parametrize("case", ["numbers", "identities", "sums_of_rows", "products"])
def test_default(platform, case):
    getattr(default_cases, case)(platform)


@pytest.mark.parametrize("case", ["in_groups", "barriers", "half_precision"])
def test_default_among_four_ranks(four, case):
    four.run(getattr(default_cases, case))
