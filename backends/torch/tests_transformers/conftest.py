# SPDX-License-Identifier: Apache-2.0
"""Ranks, and which architectures a run takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ranks look for what they run where their parent does.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from architectures import ARCHITECTURES, FEW
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-architectures", action="store_true", help="every architecture, not one of each kind")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES if metafunc.config.getoption("all_architectures") else FEW)


@pytest.fixture(params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two, and four, gloo ranks."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two gloo ranks."""
    started = Ranks(2)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four gloo ranks."""
    started = Ranks(4)
    yield started
    started.stop()
