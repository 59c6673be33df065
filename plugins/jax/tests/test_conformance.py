# SPDX-License-Identifier: Apache-2.0
"""The platform conforms."""

import pytest

from hyperep.conformance import check_platform
from hyperep.conformance.text import summary


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_platform_conforms(ranks: int) -> None:
    report = check_platform("jax", [ranks])
    assert report.conforms, summary(report, details=True)
