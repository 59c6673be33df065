# SPDX-License-Identifier: Apache-2.0
"""Results of collectives are there when they are read, which on Ascend is no matter of course."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.emulator  # hardware is late when it wants to be; the emulated device when it is told to


@pytest.mark.parametrize("ranks", [2, 4])
def test_results_are_visible_however_late_the_device_is(pools, ranks):
    pools(ranks).run("npu_programs:results_are_visible", {}, deadline=60)


def test_without_the_wait_they_are_not(pools):
    pools(2).run("npu_programs:results_are_garbage_without_the_wait", {}, deadline=60)


@pytest.mark.emulator
@pytest.mark.parametrize("chunks", [2, 3])
def test_layers_in_chunks_are_right_in_late_streams(pools, chunks):
    pools(2).run("npu_programs:chunks_agree_in_late_streams", {"chunks": chunks}, deadline=120)


@pytest.mark.emulator
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("exchange", ["to_owners", "from_owners"])
def test_a_wait_that_a_layer_in_chunks_leaves_out_is_noticed(pools, exchange, backward):
    case = {"exchange": exchange, "backward": backward}
    pools(2).run("npu_programs:chunks_disagree_without_a_wait", case, deadline=120)
