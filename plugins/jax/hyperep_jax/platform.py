# SPDX-License-Identifier: Apache-2.0
"""``JaxPlatform``: JAX on CPU as one rank of a world."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Backward, Forward
from hyperep.sharding import ShardedTensor, Sharding
from hyperep_jax import autodiff
from hyperep_jax.array_namespace import array_namespace
from hyperep_jax.autodiff import value
from hyperep_jax.exchange import gather
from hyperep_jax.launcher import ADDRESS, RANK, RANKS
from hyperep_jax.modules import Module, Parameter
from hyperep_jax.spec import CAPABILITIES

__all__ = ["JaxPlatform", "create"]

Group = tuple[int, ...]


def create() -> JaxPlatform:
    """The platform of this process: a rank of the launch that it belongs to, or a world of one."""
    jax.config.update("jax_enable_x64", True)  # counts and indices are int64
    ranks = int(os.environ.get(RANKS, 1))
    if ranks > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = os.environ[ADDRESS]
        jax.distributed.initialize(
            address,
            num_processes=ranks,
            process_id=int(os.environ[RANK]),
            coordinator_bind_address=address,  # by default it would listen on every address of this machine
        )
    return JaxPlatform()


class Done:
    """Work that was finished when it was started."""

    def __init__(self, result: jax.Array) -> None:
        self._result = result

    def wait(self) -> jax.Array:
        """The result; idempotent."""
        return self._result


class JaxPlatform(PlatformBase[jax.Array]):
    """One JAX process; the meaning of each member is in the protocol."""

    name = "jax"
    device = "cpu"
    xp = array_namespace

    @property
    def capabilities(self) -> Mapping[Capability, Support]:  # noqa: D102
        return CAPABILITIES

    @property
    def rank(self) -> int:  # noqa: D102
        return jax.process_index()

    @property
    def world_size(self) -> int:  # noqa: D102
        return jax.process_count()

    # --------------------------------------------------------------------------------------- groups and arrays
    def new_group(self, ranks: Sequence[int]) -> Group:  # noqa: D102
        group = tuple(int(rank) for rank in ranks)
        if not group or len(set(group)) != len(group) or not set(group) <= set(range(self.world_size)):
            raise ValueError(f"new_group({list(ranks)}): give distinct ranks below world_size={self.world_size}")
        return group  # a program of XLA runs on the devices that it is given; there is nothing to make

    def group_size(self, group: Group | None = None) -> int:  # noqa: D102
        return len(self._members(group))

    def _members(self, group: Group | None) -> Group:
        members = tuple(range(self.world_size)) if group is None else group
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is not in group {list(members)} and must not use it")
        return members

    def is_tensor(self, value: object) -> bool:  # noqa: D102
        return isinstance(value, jax.Array)

    def from_host(self, array: np.ndarray) -> jax.Array:  # noqa: D102
        # A copy of our own, because JAX may still be reading what it is given when it returns. And not by jnp.asarray,
        # which compiles a program for each shape.
        return jax.device_put(np.array(array))

    def to_host(self, *tensors: jax.Array) -> tuple[np.ndarray, ...]:  # noqa: D102
        arrays = jax.device_get([value(x) for x in tensors])
        return tuple(np.array(a, dtype=np.float32 if a.dtype == jnp.bfloat16 else None) for a in arrays)

    def stop_gradient(self, x: jax.Array) -> jax.Array:  # noqa: D102
        return value(x)

    # -------------------------------------------------------------------------------------------- collectives
    def all_to_all_single(  # noqa: D102
        self,
        x: jax.Array,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> jax.Array | Done:
        members = self._members(group)
        rows = np.asarray(value(x))
        splits = _splits(len(rows), input_splits, len(members))
        # Two gathers: how many rows go from whom to whom, then all rows, padded to the longest.
        matrix = np.stack(gather(np.array(splits, np.int64), members))
        padded = np.zeros((int(matrix.sum(axis=1).max()), *rows.shape[1:]), rows.dtype)
        padded[: len(rows)] = rows
        everyone = gather(padded, members)
        me = members.index(self.rank)
        starts = np.cumsum(matrix, axis=1) - matrix
        parts = [sent[a : a + n] for sent, a, n in zip(everyone, starts[:, me], matrix[:, me], strict=True)]
        if output_splits is not None and [len(p) for p in parts] != [int(n) for n in output_splits]:
            raise ValueError(
                f"rank {self.rank}: output_splits={list(output_splits)}, but the others sent {[len(p) for p in parts]}"
            )
        received = self.from_host(np.concatenate(parts))
        return Done(received) if async_op else received

    def all_gather(self, x: jax.Array, group: Group | None = None) -> jax.Array:  # noqa: D102
        return self.from_host(np.concatenate(gather(np.asarray(value(x)), self._members(group))))

    def all_reduce(self, x: jax.Array, group: Group | None = None, op: str = "sum") -> jax.Array:  # noqa: D102
        functions = {"sum": np.add, "max": np.maximum, "min": np.minimum}
        if op not in functions:
            raise ValueError(f"all_reduce(op={op!r}): choose one of {sorted(functions)}")
        total, *others = gather(np.asarray(value(x)), self._members(group))
        for term in others:  # in rank order, so that every rank gets the same bits
            total = functions[op](total, term)
        return self.from_host(total)

    def broadcast(self, x: jax.Array, source: int = 0, group: Group | None = None) -> jax.Array:  # noqa: D102
        return self.from_host(gather(np.asarray(value(x)), self._members(group))[source])

    # ------------------------------------------------------------------------------------------------ modules
    def make_module(  # noqa: D102
        self,
        name: str,
        parameters: Mapping[str, jax.Array],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, Module] | None = None,
        buffers: Mapping[str, jax.Array] | None = None,
        description: str = "",
    ) -> Module:
        return Module(name, parameters, forward, children or {}, buffers or {}, description)

    def named_modules(self, module: Module) -> dict[str, Module]:  # noqa: D102
        if not isinstance(module, Module):
            raise UnsupportedCapability("jax", Capability.MODULES, "make modules with platform.make_module")
        return dict(module.walk())

    def parameters(self, module: Module) -> dict[str, Parameter]:  # noqa: D102
        return _by_path(self.named_modules(module), "parameters")

    def buffers(self, module: Module) -> dict[str, Parameter]:  # noqa: D102
        return _by_path(self.named_modules(module), "buffers")

    def local(self, parameter: Parameter | ShardedTensor) -> jax.Array:  # noqa: D102
        return parameter.local if isinstance(parameter, ShardedTensor) else autodiff.read(parameter.bound)

    def sharding(self, parameter: Parameter | ShardedTensor) -> Sharding | None:  # noqa: D102
        return parameter.sharding

    def assign(self, parameter: Parameter, value: jax.Array) -> None:  # noqa: D102
        if value.shape != parameter.value.shape:
            raise ValueError(f"assign: a value of shape {value.shape} for a part of shape {parameter.value.shape}")
        parameter.set(autodiff.value(value).astype(parameter.value.dtype))

    def shard_parameter(self, module: Module, name: str, local: jax.Array, sharding: Sharding) -> None:  # noqa: D102
        held = module.buffers if name in module.buffers else module.parameters
        if name not in held:
            raise ValueError(f"{module.name} has no parameter {name!r} of its own; it has {sorted(held)}")
        if held[name].sharding != sharding:
            held[name] = held[name].sharded(value(local), sharding)

    def wrap_forward(self, module: Module, wrapper: Callable[..., Any]) -> None:  # noqa: D102
        module.wrappers.append(wrapper)

    # ----------------------------------------------------------------------------------------------- autodiff
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:  # noqa: D102
        return autodiff.custom_vjp(forward, backward)

    def vjp(  # noqa: D102
        self, function: Callable[..., Any], *primals: jax.Array, parameters: Sequence[Parameter] = ()
    ) -> tuple[Any, Callable[..., tuple[jax.Array, ...]]]:
        def bind(values: Sequence[Any]) -> list[Any]:
            before = [parameter.bound for parameter in parameters]
            for parameter, x in zip(parameters, values, strict=True):
                parameter.bound = x
            return before

        return autodiff.vjp(function, primals, bind, [parameter.value for parameter in parameters])


def _by_path(modules: Mapping[str, Module], kind: str) -> dict[str, Parameter]:
    return {
        f"{path}.{key}" if path else key: parameter
        for path, module in modules.items()
        for key, parameter in getattr(module, kind).items()
    }


def _splits(rows: int, splits: Sequence[int] | None, ranks: int) -> list[int]:
    if splits is None:
        if rows % ranks:
            raise ValueError(f"all_to_all_single: {rows} rows do not divide by {ranks} ranks; give the splits")
        return [rows // ranks] * ranks
    if len(splits) != ranks or sum(splits) != rows or min(splits) < 0:
        raise ValueError(f"input_splits={list(splits)} must be {ranks} non-negative counts that sum to {rows} rows")
    return [int(n) for n in splits]
