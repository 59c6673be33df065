# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer on loopback; the cases themselves are neutral."""

import parity
import pytest

from hyperep.loopback import run

STYLED_GRID = [
    *(("ep", ep, 1) for ep in (1, 2, 4)),
    *(("tp", 1, tp) for tp in (1, 2, 4)),
    *(("etp", ep, tp) for ep, tp in parity.GRID),
]
REDUCING = [("tp", 1, 2), ("etp", 1, 2), ("etp", 2, 2)]


@pytest.mark.parametrize(("style", "ep", "tp"), STYLED_GRID)
def test_sharded_layer_agrees_with_the_unsharded(style, ep, tp):
    run(lambda platform: parity.sharded_layer_agrees(platform, style, ep, tp), ep * tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
@pytest.mark.parametrize("case", [parity.backward_reduction_is_needed, parity.forward_reduction_is_needed])
def test_a_removed_reduction_is_noticed(case, style, ep, tp):
    run(lambda platform: case(platform, style, ep, tp), ep * tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_partial_output_sums_to_the_whole(style, ep, tp):
    run(lambda platform: parity.partial_output_sums_to_the_whole(platform, style, ep, tp), ep * tp)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_style_serves_two_layers(ranks):
    run(parity.one_style_serves_two_layers, ranks)
