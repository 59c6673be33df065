# SPDX-License-Identifier: Apache-2.0
"""Tests of MindSpore on the emulated Ascend device; those of PyTorch on it are in backends/torch_npu/tests.

PYTHONPATH=backends/ascend_emulator python -m ascend_emulator run -- python -m pytest backends/ascend_emulator
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hyperep
from hyperep.launch.pool import RankPool
from hyperep.platform.protocol import Platform

HERE = Path(__file__).parent


def pytest_configure() -> None:
    """Say at once how to start the tests if there is no device."""
    # Ranks import what the tests send them.
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        import mindspore
    except ImportError as error:
        raise pytest.UsageError(f"mindspore cannot be imported: {error}") from error
    if mindspore.get_context("device_target") != "Ascend":
        raise pytest.UsageError(
            "MindSpore sees no Ascend device; run the tests on the emulated one: PYTHONPATH=backends/ascend_emulator "
            "python -m ascend_emulator run -- python -m pytest backends/ascend_emulator"
        )


@pytest.fixture(scope="session")
def pools() -> Callable[[int], RankPool]:
    """Warm ranks on devices of their own: `pools(4).run("module:function", {...})`."""
    from hyperep_mindspore.launcher import launcher

    return functools.cache(lambda ranks: RankPool(launcher, "mindspore", ranks, start_deadline=240.0))


@pytest.fixture(scope="session")
def platform() -> Platform:
    """A single rank on the first device."""
    return hyperep.get_platform("mindspore")
