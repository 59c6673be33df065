# SPDX-License-Identifier: Apache-2.0
"""What ``PlatformBase`` builds for authors, on loopback."""

import default_cases
import pytest

from hyperep.loopback import run

ALONE = ["every_default_is_tested", "refusals", "numbers", "identities", "sums_of_rows", "products"]


@pytest.mark.parametrize("case", ALONE)
def test_default(case):
    run(getattr(default_cases, case), 1)


@pytest.mark.parametrize("case", ["identities", "in_groups", "barriers", "half_precision"])
def test_default_among_four_ranks(case):
    run(getattr(default_cases, case), 4)
