# SPDX-License-Identifier: Apache-2.0
"""Replicated parameters on loopback: equal on all ranks, and those of the unsharded run."""

import pytest
import replicas

from hyperep.loopback import LoopbackPlatform, run

SPREADS = [(2, "ep", 1), (4, "ep", 1), (2, "tp", 2), (4, "tp", 2), (4, "etp", 2)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("ranks", "style", "tp"), SPREADS)
def test_training_keeps_replicas_equal(ranks, style, tp, dtype):
    run(lambda platform: replicas.training_keeps_replicas_equal(platform, style, tp, dtype), ranks)


def test_a_reduction_that_changes_nothing_is_noticed(monkeypatch):
    """What an in-place collective of a view does on MindSpore's CPU."""
    monkeypatch.setattr(LoopbackPlatform, "all_reduce", lambda self, x, group=None, op="sum": x + 0)
    with pytest.raises(Exception, match="differs between ranks after 3 steps"):
        run(replicas.training_keeps_replicas_equal, 2)
