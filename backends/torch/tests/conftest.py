# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the PyTorch platform's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hyperep_torch.platform import TorchPlatform, join
from ranks import Ranks


@pytest.fixture(scope="session")
def platform() -> TorchPlatform:
    """A single rank on the CPU, without any process group at first."""
    return join(device="cpu")


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two gloo ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four gloo ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()
