# SPDX-License-Identifier: Apache-2.0
"""What ``PlatformBase`` builds for authors, on MindSpore, beside what the platform has of its own."""

import sys
from pathlib import Path

import pytest
from hyperep_mindspore.platform import join

# Ranks look for programs where their parent does.
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import default_cases


def test_buffers_of_hccl_are_refused_where_there_is_none():
    with pytest.raises(ValueError, match="hccl_buffer_mb=50 on cpu: HCCL is Ascend's"):
        join(hccl_buffer_mb=50)
    with pytest.raises(ValueError, match="hccl_buffer_mb=0: give a whole number of MB"):
        join(hccl_buffer_mb=0)


@pytest.mark.parametrize("case", ["numbers", "identities", "sums_of_rows", "products"])
def test_default(platform, case):
    getattr(default_cases, case)(platform)


def test_default_among_four_ranks(four):
    four.run("default_cases:in_groups", {}, deadline=240.0)
