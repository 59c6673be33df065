# SPDX-License-Identifier: Apache-2.0
"""Who can reach a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hyperep_jax.launcher import launcher

from hyperep.launch.world import World

NEUTRAL = str(Path(__file__).parents[3] / "tests" / "neutral")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
def test_the_coordinator_is_out_of_reach_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(NEUTRAL)
    import listening

    with World(launcher, "jax", 2, deadline=200) as world:
        world.run("style_cases:attributes_of_parameters_are_kept", {}, deadline=200)
        found = listening.of_this_process_and_its_children()
        assert found, "the coordinator listens for the ranks"
        # gloo listens at the address of this machine's name, for numbers alone; JAX has no setting for that.
        assert not {"::", "0.0.0.0"} & set(listening.beyond_loopback(found))
