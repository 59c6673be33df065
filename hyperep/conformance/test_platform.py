# SPDX-License-Identifier: Apache-2.0
"""The suite for pytest: ``pytest --pyargs hyperep.conformance --hyperep-platform=NAME``."""

from __future__ import annotations

import pytest

from hyperep.conformance.catalogue import requirements
from hyperep.conformance.pytest_plugin import session_key
from hyperep.conformance.text import failure
from hyperep.conformance.verdict import Verdict


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each world size and requirement, world by world so that ranks stay warm."""
    suite = metafunc.config.stash.get(session_key, None)
    if suite is None:
        raise pytest.UsageError("say which platform to check: --hyperep-platform=NAME")
    cases = [(n, id) for n in suite.world_sizes for id in requirements()]
    metafunc.parametrize(("ranks", "id"), cases, ids=[f"{id}@{ranks}" for ranks, id in cases])


def test_requirement(ranks: int, id: str, pytestconfig: pytest.Config) -> None:
    """The platform meets one requirement in one world."""
    suite = pytestconfig.stash[session_key]
    result = suite.run(ranks, id)
    if result.verdict in (Verdict.SMALL, Verdict.UNSUPPORTED, Verdict.BLOCKED, Verdict.UNMEASURED):
        # A blocked requirement is no fault of its own: the one that blocks it has failed already.
        pytest.skip(f"{result.verdict.value}: {result.message}")
    if result.verdict is Verdict.EXPECTED:
        pytest.xfail(result.message)
    if result.verdict not in (Verdict.PASSED, Verdict.MEASURED):
        pytest.fail(failure(suite.target.name, result, suite.seed), pytrace=False)
