# SPDX-License-Identifier: Apache-2.0
"""The pytest side of the suite. Loaded by every pytest run, so it imports nothing of the suite until it is asked to.

``pytest --pyargs hyperep.conformance --hyperep-platform=NAME --hyperep-world-size=1,2,3,4 --hyperep-report=FILE.json``
makes one test of each requirement in each world; see ``test_platform.py`` beside this file. The options are those of
the audit too: ``pytest --pyargs hyperep.audit --hyperep-audit=module:name``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hyperep.conformance.pytest_session import SuiteSession

__all__ = ["pytest_addoption", "pytest_configure", "pytest_sessionfinish", "session_key"]

session_key: pytest.StashKey[SuiteSession] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("hyperep", "conformance of hyperep platforms")
    group.addoption("--hyperep-audit", metavar="MODULE:NAME", help="layer to check with --pyargs hyperep.audit")
    group.addoption("--hyperep-platform", metavar="NAME", help="platform to check with --pyargs hyperep.conformance")
    group.addoption(
        "--hyperep-world-size", metavar="N,...", default="1,2,3,4", help="numbers of ranks (default: 1,2,3,4)"
    )
    group.addoption("--hyperep-report", metavar="FILE", help="write the report there, as JSON")
    group.addoption("--hyperep-seed", type=int, default=0, help="seed of all data (default: 0)")
    group.addoption("--hyperep-deadline", type=float, default=60.0, help="seconds per requirement (default: 60)")


def pytest_configure(config: pytest.Config) -> None:
    """Check the options before anything is collected."""
    if config.getoption("--hyperep-platform"):
        from hyperep.conformance.pytest_session import SuiteSession

        config.stash[session_key] = SuiteSession(config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the ranks and write the report."""
    suite = session.config.stash.get(session_key, None)
    if suite is not None:
        suite.finish()
