# SPDX-License-Identifier: Apache-2.0
"""A process that sees no platform but those a test installs."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_distributions import Site

import hyperep.mesh  # noqa: F401  # what it imports must be there before the path is cut
from hyperep.platform.registry import BLOCK_VARIABLE, default_registry
from hyperep.platform.selection import PLATFORM_VARIABLE


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An otherwise empty ``sys.path`` entry; the registry of the process starts anew, before and after."""
    standard_library = [path for path in sys.path if path.startswith(sysconfig.get_path("stdlib"))]
    without_sites = [path for path in standard_library if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *without_sites])
    monkeypatch.delenv(PLATFORM_VARIABLE, raising=False)
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    modules = set(sys.modules)
    default_registry.cache_clear()
    yield Site(tmp_path)
    default_registry.cache_clear()
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
