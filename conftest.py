# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of the project."""

import os

import pytest

# A process that a test starts must not be slower than the test expects: see the same settings in tox.ini.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what the shell that runs the tests has set for hyperep: it must not change what they test."""
    for variable in list(os.environ):
        if variable.startswith("HYPEREP_"):
            monkeypatch.delenv(variable)
