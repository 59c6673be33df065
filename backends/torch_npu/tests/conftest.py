# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the Ascend platform's tests. They run on real devices, or on the emulated one:

PYTHONPATH=backends/ascend_emulator python -m ascend_emulator run -- pytest backends/torch_npu/tests
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
EMULATED = int(os.environ.get("EMULATED_NPUS", "0")) > 0


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and say at once how to start the tests if there is no device."""
    # Ranks import what the tests send them: this folder's programs, and the core's cases that run on every platform.
    programs = [str(HERE), str(HERE.parents[2] / "tests" / "neutral")]
    sys.path[:0] = programs
    os.environ["PYTHONPATH"] = os.pathsep.join([*programs, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    config.addinivalue_line("markers", "emulator: a test of the emulated device itself; skipped on real devices")
    try:
        import torch

        devices = torch.npu.device_count()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise pytest.UsageError(
            f"torch_npu cannot be used here ({error}); without Ascend hardware, run the tests on the emulated device: "
            "PYTHONPATH=backends/ascend_emulator python -m ascend_emulator run -- pytest backends/torch_npu/tests"
        ) from error
    if not devices:
        raise pytest.UsageError("torch_npu sees no device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on real devices what tests the emulated one."""
    for item in items:
        if item.get_closest_marker("emulator") and not EMULATED:
            item.add_marker(pytest.mark.skip(reason="tests the emulated device"))


@pytest.fixture(scope="session")
def pools() -> Callable[[int], RankPool]:
    """Warm ranks on devices of their own: `pools(4).run("module:function", {...})`."""
    from hyperep_torch.launcher import launcher

    return functools.cache(lambda ranks: RankPool(launcher, "torch_npu", ranks))


@pytest.fixture(scope="session")
def platform() -> Platform:
    """A single rank on the first device."""
    return hyperep.get_platform("torch_npu")
