# SPDX-License-Identifier: Apache-2.0
"""What the user may have got wrong, found out before a rank is started: one line, and not that of a failed rank."""

from __future__ import annotations

from pathlib import Path

from hyperep.platform.capabilities import Capability, Support, complete
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.spec import PlatformSpec
from hyperep.train import checkpoint
from hyperep.train.claim import check_claim, run_id
from hyperep.train.inputs import read_inputs
from hyperep.train.settings import Settings

__all__ = ["preflight"]


def preflight(settings: Settings, spec: PlatformSpec, ranks: int) -> None:
    """Check what can be checked without ranks; writes nothing.

    Raises:
        ValueError: the settings do not fit the ranks; the text, the checkpoint or the output directory cannot be used.
        OSError: a file is missing, or cannot be read.
        UnsupportedCapability: the platform does not have the precision that is wanted, on any device.
    """
    settings.check(ranks)
    if settings.dtype == "float64" and complete(spec.capabilities)[Capability.FLOAT64] is Support.UNSUPPORTED:
        raise UnsupportedCapability(spec.name, Capability.FLOAT64, "train with --dtype float32 or auto")
    inputs = read_inputs(settings)
    if inputs.resume is not None:
        checkpoint.check(inputs.resume)
    out = Path(settings.out)
    check_claim(out, run_id(out, inputs.resume), overwrite=settings.overwrite)
