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


@pytest.mark.parametrize("name", bad_input_cases.NONE)
def test_none_is_no_mesh(name):
    run(lambda platform: bad_input_cases.none_is_no_mesh(platform, name), 1)


def test_none_is_no_platform():
    bad_input_cases.none_is_no_platform()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", bad_input_cases.UNLIKE)
def test_unlike_on_one_rank_raises_on_all(name, ranks):
    run(lambda platform: bad_input_cases.unlike_on_one_rank_raises_on_all(platform, name), ranks)


def test_unlike_in_a_grid_raises_on_all():
    run(bad_input_cases.unlike_in_a_grid_raises_on_all, 4)
