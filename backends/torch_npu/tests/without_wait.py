# SPDX-License-Identifier: Apache-2.0
"""A mutant of the platform, as a plugin of its own: it hands out what a collective returns without waiting for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hyperep_torch_npu.spec import hyperep_platform_spec as original_spec

from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec

NAME = "torch_npu_without_wait"


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """The platform's own description, with another name and factory."""
    return dataclasses.replace(original_spec(), name=NAME, factory="without_wait:join", priority=-1)


def join() -> Any:
    """The platform, whose work is done as soon as it is issued."""
    from hyperep_torch.collectives import TorchWork
    from hyperep_torch.world import join_world
    from hyperep_torch_npu.device import NPU
    from hyperep_torch_npu.platform import TorchNpuPlatform

    TorchWork.wait = lambda self: self._output  # type: ignore[method-assign]

    class Mutant(TorchNpuPlatform):
        name = NAME

    return Mutant(join_world("npu", 30.0, kinds=(NPU,)))
