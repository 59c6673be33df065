# SPDX-License-Identifier: Apache-2.0
"""Platforms that do not do what they declare."""

from typing import ClassVar

from hyperep.loopback.platform import CAPABILITIES, LoopbackPlatform
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from mutants.registry import mutant


@mutant("RS-values", says="UNSUPPORTED")
class WorksThoughUnsupported(LoopbackPlatform):
    capabilities: ClassVar = {**CAPABILITIES, Capability.REDUCE_SCATTER: Support.UNSUPPORTED}


@mutant("RS-values", says="declared FULL")
class RefusesThoughDeclared(LoopbackPlatform):
    def reduce_scatter(self, x, group=None):
        raise UnsupportedCapability("loopback", Capability.REDUCE_SCATTER, "not today")


@mutant("RS-values", deadline=30, says="on rank 1 only, while others wait")
class RefusesOnOneRank(LoopbackPlatform):
    """The others are told soon, and not at the deadline."""

    def reduce_scatter(self, x, group=None):
        if self.rank == 1:
            raise UnsupportedCapability("loopback", Capability.REDUCE_SCATTER, "not today")
        return super().reduce_scatter(x, group)


@mutant("ID-capabilities")
class ClaimsMoreThanItsSpec(LoopbackPlatform):
    capabilities: ClassVar = {**CAPABILITIES, Capability.BFLOAT16: Support.FULL}


@mutant("ID-surface")
class MemberMissing(LoopbackPlatform):
    @property
    def sum_rows(self):
        raise AttributeError("sum_rows")
