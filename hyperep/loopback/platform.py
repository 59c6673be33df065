# SPDX-License-Identifier: Apache-2.0
"""The reference platform: NumPy, every rank a thread of one process, deterministic, with gradients.

It is the oracle of the tests and the model for authors: each member does what the protocol says in the plainest way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from autograd.tracer import isbox

from hyperep.loopback import autodiff
from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.exchange import Exchange
from hyperep.loopback.modules import LoopbackModule, LoopbackParameter
from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.protocol import Backward, Forward
from hyperep.sharding import ShardedTensor, Sharding

__all__ = ["CAPABILITIES", "LoopbackPlatform", "LoopbackWork"]

CAPABILITIES: Mapping[Capability, Support] = {
    capability: Support.FULL
    for capability in Capability
    if capability not in (Capability.FLOAT16, Capability.BFLOAT16, Capability.NATIVE_TRAINING)
}
"""NumPy has no bfloat16, and its float16 products are too slow and too coarse to be an oracle. It trains nothing."""

Group = tuple[int, ...]

_value = autodiff.plain


class LoopbackWork:
    """A collective under way; the others' data are collected by the first ``wait``."""

    def __init__(self, finish: Callable[[], np.ndarray]) -> None:
        self._finish: Callable[[], np.ndarray] | None = finish
        self._result: np.ndarray | None = None

    def wait(self) -> np.ndarray:
        """Return the result; idempotent."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        assert self._result is not None
        return self._result


class LoopbackPlatform(PlatformBase[np.ndarray]):
    """One rank of a loopback world."""

    def __init__(self, rank: int = 0, exchange: Exchange | None = None) -> None:
        self._rank = rank
        self._exchange = exchange or Exchange(1)
        self._world: Group = tuple(range(self._exchange.world_size))
        self._issued: dict[Group, int] = {}
        self._groups_made = 0

    name = "loopback"
    device = "cpu"
    capabilities = CAPABILITIES
    xp = array_namespace

    @property
    def rank(self) -> int:  # noqa: D102
        return self._rank

    @property
    def world_size(self) -> int:  # noqa: D102
        return len(self._world)

    # ---------------------------------------------------------------------------------------------- groups
    def new_group(self, ranks: Sequence[int]) -> Group:  # noqa: D102
        group = tuple(int(rank) for rank in ranks)
        outside = [rank for rank in group if rank not in self._world]
        if outside or len(set(group)) != len(group):
            raise ValueError(f"new_group({list(group)}): ranks must be distinct and below world_size={self.world_size}")
        # Meeting with the ranks as payload shows at once where ranks make groups in a different order.
        self._meet(self._world, f"new_group({list(group)})", None)
        self._groups_made += 1
        # The serial number keeps two groups of the same ranks apart: each has its own order of collectives.
        return (*group, -self._groups_made)

    def group_size(self, group: Group | None = None) -> int:  # noqa: D102
        return len(self._members(group))

    def _members(self, group: Group | None) -> Group:
        members = self._world if group is None else tuple(rank for rank in group if rank >= 0)
        if self._rank not in members:
            raise ValueError(f"rank {self._rank} is not in group {list(members)} and must not use it")
        return members

    # ---------------------------------------------------------------------------------------------- arrays
    def is_tensor(self, value: object) -> bool:  # noqa: D102
        return isinstance(value, np.ndarray | np.generic) or isbox(value)

    def from_host(self, array: np.ndarray) -> np.ndarray:  # noqa: D102
        return np.array(array)

    def to_host(self, *tensors: np.ndarray) -> tuple[np.ndarray, ...]:  # noqa: D102
        return tuple(np.array(_value(x)) for x in tensors)

    # ----------------------------------------------------------------------------------------- collectives
    def all_to_all_single(  # noqa: D102
        self,
        x: np.ndarray,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> np.ndarray | LoopbackWork:
        members = self._members(group)
        value = _value(x)
        parts = np.split(value, np.cumsum(_splits(value, input_splits, len(members), "input_splits"))[:-1])
        me = members.index(self._rank)
        collect = self._post(group, f"all_to_all_single of {value.dtype}", parts)

        def finish() -> np.ndarray:
            received = [sent[me] for sent in collect()]
            if output_splits is not None and [len(rows) for rows in received] != [int(n) for n in output_splits]:
                raise ValueError(
                    f"rank {self._rank}: output_splits={list(output_splits)} but the others sent "
                    f"{[len(rows) for rows in received]} rows; each rank's output_splits must mirror the input_splits"
                )
            return np.concatenate(received)

        return LoopbackWork(finish) if async_op else finish()

    def all_gather(self, x: np.ndarray, group: Group | None = None) -> np.ndarray:  # noqa: D102
        return np.concatenate(self._meet(group, "all_gather", _value(x)))

    def reduce_scatter(self, x: np.ndarray, group: Group | None = None) -> np.ndarray:  # noqa: D102
        members = self._members(group)
        total = _reduce("sum", self._meet(group, "reduce_scatter", _value(x)))
        rows = _splits(total, None, len(members), "reduce_scatter")[0]
        me = members.index(self._rank)
        return total[me * rows : (me + 1) * rows]

    def all_reduce(self, x: np.ndarray, group: Group | None = None, op: str = "sum") -> np.ndarray:  # noqa: D102
        return _reduce(op, self._meet(group, f"all_reduce({op})", _value(x)))

    def broadcast(self, x: np.ndarray, source: int = 0, group: Group | None = None) -> np.ndarray:  # noqa: D102
        return self._meet(group, f"broadcast(source={source})", _value(x))[source].copy()

    def _post(self, group: Group | None, operation: str, payload: Any) -> Callable[[], list[Any]]:
        members = self._members(group)
        key = members if group is None else tuple(group)
        self._issued[key] = self._issued.get(key, 0) + 1
        # A copy is posted: the sender may overwrite its tensor before a slower rank reads it.
        return self._exchange.post(members, (key, self._issued[key]), self._rank, operation, _copied(payload))

    def _meet(self, group: Group | None, operation: str, payload: Any) -> list[Any]:
        return self._post(group, operation, payload)()

    # --------------------------------------------------------------------------------------------- modules
    def make_module(  # noqa: D102
        self,
        name: str,
        parameters: Mapping[str, np.ndarray],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, Any] | None = None,
        buffers: Mapping[str, np.ndarray] | None = None,
        description: str = "",
    ) -> LoopbackModule:
        return LoopbackModule(name, parameters, forward, children or {}, buffers or {}, description)

    def named_modules(self, module: Any) -> dict[str, Any]:  # noqa: D102
        if not isinstance(module, LoopbackModule):
            raise TypeError(
                f"platform 'loopback' got a {type(module).__module__}.{type(module).__qualname__}, not one of its "
                "modules; make modules and meshes with the same platform"
            )
        return dict(module.walk())

    def parameters(self, module: Any) -> dict[str, LoopbackParameter]:  # noqa: D102
        return {
            f"{path}.{key}" if path else key: parameter
            for path, part in self.named_modules(module).items()
            for key, parameter in part.own_parameters.items()
        }

    def buffers(self, module: Any) -> dict[str, LoopbackParameter]:  # noqa: D102
        return {
            f"{path}.{key}" if path else key: buffer
            for path, part in self.named_modules(module).items()
            for key, buffer in part.own_buffers.items()
        }

    def local(self, parameter: LoopbackParameter | ShardedTensor) -> np.ndarray:  # noqa: D102
        return parameter.local if isinstance(parameter, ShardedTensor) else parameter.bound

    def sharding(self, parameter: LoopbackParameter | ShardedTensor) -> Sharding | None:  # noqa: D102
        return parameter.sharding

    def assign(self, parameter: LoopbackParameter, value: np.ndarray) -> None:  # noqa: D102
        if value.shape != parameter.value.shape:
            raise ValueError(f"assign: value of shape {value.shape} for a local part of shape {parameter.value.shape}")
        parameter.value[...] = _value(value)

    def functional_call(  # noqa: D102
        self,
        module: Any,
        parameters: Mapping[str, np.ndarray],
        function: Callable[..., Any],
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        handles = self.parameters(module)
        before = {name: handles[name].bound for name in parameters}
        try:
            for name, value in parameters.items():
                handles[name].bound = value
            return function(*inputs, **kwargs)
        finally:
            for name, value in before.items():
                handles[name].bound = value

    def shard_parameter(self, module: Any, name: str, local: np.ndarray, sharding: Sharding) -> None:  # noqa: D102
        held = module.own_buffers if name in module.own_buffers else module.own_parameters
        if name not in held:
            raise ValueError(f"{module.name} has no parameter {name!r} of its own; it has {sorted(held)}")
        if held[name].sharding != sharding:
            held[name] = held[name].sharded(_value(local), sharding)

    def wrap_forward(self, module: Any, wrapper: Callable[..., Any]) -> None:  # noqa: D102
        module.wrappers.append(wrapper)

    # -------------------------------------------------------------------------------------------- autodiff
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:  # noqa: D102
        return autodiff.custom_vjp(forward, backward)

    def vjp(  # noqa: D102
        self, function: Callable[..., Any], *primals: np.ndarray, parameters: Sequence[LoopbackParameter] = ()
    ) -> tuple[Any, Callable[..., tuple[np.ndarray, ...]]]:
        def bind(values: Sequence[Any]) -> list[Any]:
            before = [parameter.bound for parameter in parameters]
            for parameter, value in zip(parameters, values, strict=True):
                parameter.bound = value
            return before

        return autodiff.vjp(function, primals, bind, [parameter.value for parameter in parameters])

    def __repr__(self) -> str:
        return f"LoopbackPlatform(rank={self.rank}, world_size={self.world_size})"


def _copied(payload: Any) -> Any:
    """What a rank brings to a collective: an array, a list of arrays, or nothing."""
    if payload is None:
        return None
    return [np.array(part) for part in payload] if isinstance(payload, list) else np.array(payload)


def _splits(x: np.ndarray, splits: Sequence[int] | None, ranks: int, what: str) -> list[int]:
    if splits is None:
        if len(x) % ranks:
            raise ValueError(f"{what}: {len(x)} rows do not divide by the {ranks} ranks; give the splits")
        return [len(x) // ranks] * ranks
    if len(splits) != ranks or sum(splits) != len(x) or min(splits) < 0:
        raise ValueError(f"{what}={list(splits)} must be {ranks} non-negative counts that sum to the {len(x)} rows")
    return [int(n) for n in splits]


def _reduce(op: str, terms: Sequence[np.ndarray]) -> np.ndarray:
    functions = {"sum": np.add, "max": np.maximum, "min": np.minimum}
    if op not in functions:
        raise ValueError(f"all_reduce(op={op!r}): choose one of {sorted(functions)}")
    total = terms[0]
    for term in terms[1:]:  # in rank order, so that every rank gets the same bits
        total = functions[op](total, term)
    return np.array(total)
