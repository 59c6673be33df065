# SPDX-License-Identifier: Apache-2.0
"""Capabilities: what a platform declares about itself, and how well it does it.

The core asks for a capability and never for the name of a framework. The same table drives the selection of
conformance requirements and the printed compatibility matrix.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["Capability", "Support", "complete"]


class Support(enum.Enum):
    """How a platform provides a capability."""

    FULL = "full"
    """Natively, by the framework's own operator."""
    EMULATED = "emulated"
    """With the right result, composed from other operators; slower, and said so in the matrix."""
    UNSUPPORTED = "unsupported"
    """Not at all: using it raises ``UnsupportedCapability``."""


class Capability(enum.Enum):
    """One thing that the core, or a user of the core, may ask of a platform."""

    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    BROADCAST = "broadcast"
    ASYNC_COLLECTIVES = "async_collectives"
    SUBGROUPS = "subgroups"
    PERMUTE_ROWS = "permute_rows"
    GROUPED_MATMUL = "grouped_matmul"
    AUTODIFF = "autodiff"
    MODULES = "modules"
    SHARDED_PARAMETERS = "sharded_parameters"
    FUNCTIONAL_CALL = "functional_call"
    """Modules may be called with other tensors in place of their parameters; balanced experts rest on it."""
    THREADS = "threads"
    """Collectives of different groups may be issued from several threads of one rank."""
    NATIVE_TRAINING = "native_training"
    """The framework has a backward, optimizers and saved state of its own, and the platform's ``native_training`` tells
    the suite how they are called (:class:`hyperep.conformance.native.NativeTraining`)."""
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def complete(declared: Mapping[Capability, Support]) -> dict[Capability, Support]:
    """Return *declared* with every capability that it leaves out filled in as ``UNSUPPORTED``."""
    return {capability: declared.get(capability, Support.UNSUPPORTED) for capability in Capability}
