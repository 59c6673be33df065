# SPDX-License-Identifier: Apache-2.0
"""What this plugin says about itself before PyTorch is imported."""

from __future__ import annotations

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.spec import PlatformSpec

__all__ = ["CAPABILITIES", "hyperep_platform_spec"]

CAPABILITIES = dict.fromkeys(Capability, Support.FULL)
"""What PyTorch can do on its best device; a platform object states what it declares less on the one at hand."""


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    """Describe the ``torch`` platform."""
    return PlatformSpec(
        name="torch",
        api=(2, 2),
        factory="hyperep_torch.platform:join",
        probe="hyperep_torch.probe:probe",
        description="PyTorch: CUDA with NCCL, CPU with gloo",
        install_hint="pip install hyperep-torch",
        priority=100,
        capabilities=CAPABILITIES,
        launcher="hyperep_torch.launcher:launcher",
        expected_failures={
            "A2A-splits-disagree": "PyTorch's backends do not tell how many rows came; splits that the core makes are "
            "exchanged first, and cannot disagree",
        },
    )
