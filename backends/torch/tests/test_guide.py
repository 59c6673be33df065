# SPDX-License-Identifier: Apache-2.0
"""The eager framework of the guide for authors: its classes as written, in a platform that the suite is run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "writing-a-platform.md"
ASKED = ("MOD", "CUSTOM", "VJP", "SHARD")

BEFORE = """
import dataclasses
import functools

import torch
from hyperep_torch.platform import TorchPlatform
from hyperep_torch.spec import hyperep_platform_spec as torch_spec
from hyperep_torch.world import join_world
from torch import nn

from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.sharding import ShardedTensor

CAPABILITIES = {**torch_spec().capabilities, Capability.FUNCTIONAL_CALL: Support.UNSUPPORTED}
"""
AFTER = '''
class Eager(EagerModules, EagerAutodiff, TorchPlatform):
    """The guide's modules and gradients; the defaults that are made of them; PyTorch's arrays and collectives."""

    name = "eager"
    capabilities = CAPABILITIES
    functional_call, from_local = PlatformBase.functional_call, PlatformBase.from_local
    permute_rows, sum_rows, stop_gradient = PlatformBase.permute_rows, PlatformBase.sum_rows, PlatformBase.stop_gradient
    grouped_matmul, copy_to_group = PlatformBase.grouped_matmul, PlatformBase.copy_to_group
    swiglu, grouped_swiglu = PlatformBase.swiglu, PlatformBase.grouped_swiglu
    differentiable_all_to_all_single = PlatformBase.differentiable_all_to_all_single


def join():
    return Eager(join_world())


@hookimpl
def hyperep_platform_spec():
    return dataclasses.replace(
        torch_spec(), name="eager", factory="eager_framework:join", priority=-1, capabilities=CAPABILITIES
    )
'''


def program() -> str:
    """The Python blocks of the guide's section, in a module of their own."""
    section = GUIDE.read_text(encoding="utf-8").split("### An eager framework with native modules\n")[1]
    blocks = re.findall(r"^```python\n(.*?)^```", section.split("\n## ")[0], flags=re.M | re.S)
    assert len(blocks) == 4
    return "\n\n".join([BEFORE, *blocks, AFTER])


def test_an_eager_framework_conforms(tmp_path):
    (tmp_path / "eager_framework.py").write_text(program(), encoding="utf-8")
    described = tmp_path / "eager_framework-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: eager-framework\nVersion: 0.1\n")
    (described / "entry_points.txt").write_text("[hyperep.platforms]\neager = eager_framework\n")
    search = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    only = [word for name in ASKED for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-m", "hyperep", "conformance", "run", "--platform", "eager", "--world-size", "2", *only],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
