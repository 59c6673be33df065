# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the MindSpore platform's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hyperep_mindspore.launcher import launcher
from hyperep_mindspore.platform import MindSporePlatform, join
from mindspore import Tensor

from hyperep.launch.pool import RankPool

# The core's neutral cases; ranks look for programs where their parent does.
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))


@pytest.fixture(scope="session")
def platform() -> MindSporePlatform:
    """A single rank, without any communication."""
    return join()


@pytest.fixture
def stale_memory() -> None:
    """Fill MindSpore's pool with NaN, so that a kernel that writes nothing is seen to leave it so."""
    stale = [
        Tensor(np.full(n, np.nan, np.float32)) * 1 for n in (1, 3, 5, 8, 15, 16, 32, 64, 128, 256) for _ in range(30)
    ]
    for tensor in stale:
        tensor.asnumpy()


@pytest.fixture(scope="session")
def two() -> Iterator[RankPool]:
    """Two ranks, warm."""
    with RankPool(launcher, "mindspore", 2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four() -> Iterator[RankPool]:
    """Four ranks, warm."""
    with RankPool(launcher, "mindspore", 4, start_deadline=240.0) as pool:
        yield pool


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """Worlds of two and of four ranks."""
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])
