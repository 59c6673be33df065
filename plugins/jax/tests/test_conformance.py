# SPDX-License-Identifier: Apache-2.0
"""The platform conforms."""

import pytest

from hyperep.conformance import check_platform
from hyperep.conformance.text import summary


# Nearly every operator on every shape is compiled once on each rank, which takes minutes on a small machine.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_platform_conforms(ranks: int) -> None:
    report = check_platform("jax", [ranks], deadline=200)
    assert report.conforms, summary(report, details=True)
