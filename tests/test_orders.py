# SPDX-License-Identifier: Apache-2.0
"""Orders of small integers: against NumPy's, past what float32 holds, and that layers sort nothing else."""

import numpy as np
import pytest
import token_cases
from hypothesis import given
from hypothesis import strategies as st

from hyperep.exchange.orders import argsort_below, inverse_order
from hyperep.loopback import run
from hyperep.loopback.array_namespace import array_namespace as xp
from hyperep.moe import MoEConfig, RouterConfig, build_moe

EXACT = 2**24


@given(st.lists(st.integers(0, 5), max_size=30))
def test_equals_stay_in_order(numbers):
    """A sort that is not stable, or an inverse of something else."""
    numbers = np.array(numbers, np.int64)
    order = argsort_below(xp, numbers, 6)
    np.testing.assert_array_equal(order, np.argsort(numbers, kind="stable"))
    np.testing.assert_array_equal(inverse_order(xp, order)[order], np.arange(numbers.size))
    assert order.dtype == np.int64


def test_along_an_axis():
    numbers = np.random.default_rng(0).integers(0, 4, (3, 5))
    for axis in (0, 1):
        order = argsort_below(xp, numbers, 4, axis)
        np.testing.assert_array_equal(order, np.argsort(numbers, axis=axis, kind="stable"))
        np.testing.assert_array_equal(inverse_order(xp, order, axis), np.argsort(order, axis=axis))


@pytest.mark.parametrize("limit", [EXACT, EXACT + 2])
def test_what_float32_does_not_hold_stays_an_integer(limit):
    """Neighbours that become equals, and are then left in the order in which they came."""
    numbers = np.array([limit - 1, limit - 2, 7, limit - 3], np.int64)
    np.testing.assert_array_equal(argsort_below(xp, numbers, limit), [2, 3, 1, 0])


@pytest.fixture
def sorted_dtypes(monkeypatch):
    """The dtypes of what is sorted meanwhile, on all ranks."""
    seen, argsort = set(), xp.argsort

    def watched(x, **options):
        seen.add(np.asarray(getattr(x, "_value", x)).dtype)
        return argsort(x, **options)

    monkeypatch.setattr(xp, "argsort", watched)
    return seen


def _layer(platform):
    for policy in ("probability", "position"):
        router = RouterConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2)
        config = MoEConfig(dim=4, hidden_dim=6, router=router, capacity_factor=1.0, drop_policy=policy)
        x = platform.from_host(np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32))
        build_moe(platform, config)(x, with_stats=True)


@pytest.mark.parametrize("way", ["layer", "tokens", "rows", "balanced"])
def test_a_layer_sorts_no_integers(sorted_dtypes, way):
    """Sorts that Ascend does on its AI CPU."""
    if way == "layer":
        run(_layer, 1)
    else:
        run(lambda platform: token_cases.agrees(platform, way, (2,)), 2)
    assert sorted_dtypes
    assert all(dtype.kind == "f" for dtype in sorted_dtypes), sorted_dtypes
