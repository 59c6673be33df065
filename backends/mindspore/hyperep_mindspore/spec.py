# SPDX-License-Identifier: Apache-2.0
"""What this plugin says about itself before MindSpore is imported."""

from __future__ import annotations

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec

__all__ = ["CAPABILITIES", "hyperep_platform_spec"]

CAPABILITIES = {
    **dict.fromkeys(Capability, Support.FULL),
    # MindSpore's PyNative executor is one object of the process, with one stack of graphs.
    Capability.THREADS: Support.UNSUPPORTED,
}
"""What MindSpore can do on its best device; a platform object states what it declares less on the one at hand."""


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """Describe the ``mindspore`` platform."""
    return PlatformSpec(
        name="mindspore",
        api=(2, 2),
        factory="hyperep_mindspore.platform:join",
        probe="hyperep_mindspore.probe:probe",
        description="MindSpore in PyNative mode: CPU, and Ascend with HCCL",
        install_hint="pip install hyperep-mindspore",
        priority=50,
        capabilities=CAPABILITIES,
        launcher="hyperep_mindspore.launcher:launcher",
        expected_failures={
            "A2A-splits-disagree": "MindSpore does not tell how many rows came; splits that the core makes are "
            "exchanged first, and cannot disagree",
            "XP-float64-scalars": "the operators of MindSpore's tensors take a Python float as float32; make a "
            "tensor of float64 of it where its digits matter",
        },
    )
