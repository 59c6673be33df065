# SPDX-License-Identifier: Apache-2.0
"""Ranks, and which architectures a run takes."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ranks look for what they run where their parent does.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from architectures import ARCHITECTURES, FEW, ONE
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-architectures", action="store_true", help="every architecture, not one of each kind")
    parser.addoption("--write-matrix", type=Path, help="a file for what was found, from which the page's table is made")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, few in (("architecture", FEW), ("examined", ONE)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, ARCHITECTURES if metafunc.config.getoption("all_architectures") else few)


class Matrix:
    """What was found, by architecture, check and door: nothing, or why the check could not be made."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, dict[str, str | None]]] = {}

    def note(self, architecture: str, check: str, door: str, why: str | None) -> None:
        """One cell; it holds at every number of ranks."""
        doors = self.cells.setdefault(architecture, {}).setdefault(check, {})
        doors[door] = doors.get(door) or why

    def write(self, path: Path) -> None:
        """With the versions and the day."""
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch", "peft", "accelerate")}
        found = {"date": datetime.date.today().isoformat(), "versions": versions, "cells": self.cells}
        path.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    """Written at the end, if everything held that was asked for."""
    found = Matrix()
    yield found
    path = request.config.getoption("write_matrix")
    if path is not None and not request.session.testsfailed:
        found.write(path)


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
