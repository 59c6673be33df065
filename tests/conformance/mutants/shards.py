# SPDX-License-Identifier: Apache-2.0
"""Platforms whose distributed tensors and shards have the right shapes, and not the right values or gradients."""

import dataclasses

import numpy as np
from autograd.tracer import isbox

from hyperep.loopback.modules import LoopbackParameter
from hyperep.loopback.platform import LoopbackPlatform, _value
from hyperep.sharding import ShardedTensor
from mutants.registry import mutant


@mutant("DIST-values")
class MadeOfZeros(LoopbackPlatform):
    def from_local(self, local, sharding):
        return super().from_local(local * 0, sharding)


@mutant("DIST-values", says="local of from_local")
class MadeOfTheFirstPart(LoopbackPlatform):
    """Every rank holds the part of the first one."""

    def from_local(self, local, sharding):
        return super().from_local(self.broadcast(local), sharding)


@mutant("DIST-values", says="dtype")
class MadeInFloat32(LoopbackPlatform):
    def from_local(self, local, sharding):
        return super().from_local(local.astype(np.float32) if local.dtype.kind == "f" else local, sharding)


@mutant("DIST-values", says="sharding")
class LayoutOfDimZero(LoopbackPlatform):
    """The shape is right."""

    def from_local(self, local, sharding):
        made = super().from_local(local, sharding)
        first = dataclasses.replace(sharding.placements[0], dim=0) if hasattr(sharding.placements[0], "dim") else None
        if first is None or first == sharding.placements[0]:
            return made
        other = dataclasses.replace(sharding, placements=(first,))

        class Lying(ShardedTensor):
            shape = made.shape

        return Lying(local, other)


@mutant("DIST-first-rank")
class OwnTensorDistributed(LoopbackPlatform):
    """Broadcasts of two dims and this size leave each rank its own."""

    def broadcast(self, x, source=0, group=None):
        out = super().broadcast(x, source, group)
        ours = out.shape == (2 * self.world_size, 3 * self.world_size) and out.dtype == np.float32
        return np.array(_value(x)) if ours else out


@mutant("DIST-gradients")
class MadeOfAConstant(LoopbackPlatform):
    def from_local(self, local, sharding):
        return super().from_local(_value(local), sharding)


@mutant("MOD-local-gradients")
class LocalDetached(LoopbackPlatform):
    def local(self, parameter):
        return _value(super().local(parameter))


@mutant("MOD-local-gradients", says="sharded: True")
class LocalOfShardsDetached(LoopbackPlatform):
    def local(self, parameter):
        out = super().local(parameter)
        return _value(out) if isinstance(parameter, LoopbackParameter) and parameter.sharding else out


@mutant("SHARD-assign-values", says="transposed")
class AssignsByMemory(LoopbackPlatform):
    def assign(self, parameter, value):
        value = _value(value)
        by_memory = value.ravel(order="K").reshape(value.shape)
        super().assign(parameter, value if parameter.sharding is None else by_memory)


@mutant("SHARD-assign-values", says="integers")
class ShardsTakeTheDtypeOfTheValue(LoopbackPlatform):
    def assign(self, parameter, value):
        super().assign(parameter, value)
        if parameter.sharding is not None:
            parameter.value = parameter.bound = np.array(_value(value))


@mutant("SHARD-assign-values", says="written to")
class ShardsAdoptWhatIsAssigned(LoopbackPlatform):
    def assign(self, parameter, value):
        super().assign(parameter, value)
        if parameter.sharding is not None and _value(value).dtype == parameter.value.dtype:
            parameter.value = parameter.bound = _value(value)


@mutant("SHARD-assign-values", says="nothing was raised")
class ShardsBroadcastWhatIsAssigned(LoopbackPlatform):
    """One row for all rows, as assignment by index does."""

    def assign(self, parameter, value):
        if parameter.sharding is not None and value.shape[0] == 1:
            parameter.value[...] = _value(value)
        else:
            super().assign(parameter, value)


@mutant("SHARD-assign-values", says="sharding of b")
class BuffersStayWhole(LoopbackPlatform):
    """A buffer gets its part, and no layout."""

    def shard_parameter(self, module, name, local, sharding):
        super().shard_parameter(module, name, local, sharding)
        if name in module.own_buffers:
            module.own_buffers[name].sharding = None


@mutant("MOD-assign-while-differentiated")
class AssignRecords(LoopbackPlatform):
    def assign(self, parameter, value):
        super().assign(parameter, value)
        parameter.bound = value if isbox(value) else parameter.value


@mutant("MOD-assign-while-differentiated", says="TypeError")
class AssignRefusesTracedTensors(LoopbackPlatform):
    def assign(self, parameter, value):
        if not isinstance(value, np.ndarray):
            raise TypeError("assign takes arrays")
        super().assign(parameter, value)


@mutant("SHARD-attributes")
class AttributesLost(LoopbackPlatform):
    def shard_parameter(self, module, name, local, sharding):
        super().shard_parameter(module, name, local, sharding)
        module.own_parameters[name] = LoopbackParameter(_value(local), sharding)
