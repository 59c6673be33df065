# SPDX-License-Identifier: Apache-2.0
"""Bad input to meshes, styles and layers, on two ranks of loopback."""

import bad_input_cases
import pytest

from hyperep.loopback import run


@pytest.mark.parametrize("name", bad_input_cases.CASES)
def test_raises_on_every_rank(name):
    run(lambda platform: bad_input_cases.raises_on_every_rank(platform, name), 2)


def test_a_refused_style_changes_nothing():
    run(bad_input_cases.a_refused_style_changes_nothing, 2)
