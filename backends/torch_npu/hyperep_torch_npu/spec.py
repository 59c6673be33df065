# SPDX-License-Identifier: Apache-2.0
"""What this plugin says about itself before PyTorch is imported."""

from __future__ import annotations

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec

__all__ = ["CAPABILITIES", "hyperep_platform_spec"]

CAPABILITIES = {
    **dict.fromkeys(Capability, Support.FULL),
    # HCCL reduces no float64, and the device multiplies none.
    Capability.FLOAT64: Support.UNSUPPORTED,
    # HCCL wants the collectives of one device in one order, whichever group they belong to.
    Capability.THREADS: Support.UNSUPPORTED,
}
"""What PyTorch can do on Ascend."""


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """Describe the ``torch_npu`` platform."""
    return PlatformSpec(
        name="torch_npu",
        api=(2, 2),
        factory="hyperep_torch_npu.platform:join",
        probe="hyperep_torch_npu.probe:probe",
        description="PyTorch on Ascend: torch_npu with HCCL",
        install_hint="pip install hyperep-torch-npu, and install CANN",
        # Above the CPU and CUDA of hyperep-torch, which this distribution brings with it: where an Ascend device
        # answers, it is what its owner means.
        priority=110,
        capabilities=CAPABILITIES,
        launcher="hyperep_torch.launcher:launcher",
        expected_failures={
            "A2A-splits-disagree": "HCCL does not tell how many rows came; splits that the core makes are exchanged "
            "first, and cannot disagree",
        },
    )
