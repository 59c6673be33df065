# SPDX-License-Identifier: Apache-2.0
"""A plugin as it was written for version 1 of the protocol, and not changed since. Do not mend it: mend the core.

It stands for the plugins of others, which nobody rewrites when the core goes on. Its framework is the reference
platform's; every signature and every import is that of version 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hyperep.loopback
from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.protocol import Backward, Forward
from hyperep.platform.spec import PlatformSpec, Viability
from hyperep.sharding import Sharding

CAPABILITIES = {
    Capability.ALL_TO_ALL: Support.FULL,
    Capability.ALL_GATHER: Support.FULL,
    Capability.ALL_REDUCE: Support.FULL,
    Capability.BROADCAST: Support.FULL,
    Capability.REDUCE_SCATTER: Support.EMULATED,
    Capability.ASYNC_COLLECTIVES: Support.FULL,
    Capability.SUBGROUPS: Support.FULL,
    Capability.PERMUTE_ROWS: Support.FULL,
    Capability.GROUPED_MATMUL: Support.EMULATED,
    Capability.AUTODIFF: Support.FULL,
    Capability.MODULES: Support.FULL,
    Capability.SHARDED_PARAMETERS: Support.FULL,
    Capability.FLOAT64: Support.FULL,
}


@hookimpl
def hyperep_platform_spec() -> PlatformSpec:
    return PlatformSpec(
        name="kept",
        api_version=1,
        factory="kept:create",
        probe="kept:probe",
        description="a plugin of version 1",
        install_hint="pip install hyperep-kept",
        priority=-200,
        capabilities=CAPABILITIES,
        launcher="kept:launcher",
        expected_failures={},
    )


def probe() -> Viability:
    return Viability.yes("as ever", framework="kept 1.0")


def create() -> "KeptPlatform":
    return KeptPlatform(hyperep.loopback.LoopbackPlatform())


class KeptLauncher(Launcher):
    def joined(self) -> bool:
        return False

    def plan(self, ranks: int) -> LaunchPlan:
        return LaunchPlan(processes=(RankProcess(ranks=tuple(range(ranks))),))

    def host(self, process: RankProcess, function: Callable[[Any], Any], platform_name: str) -> list[Any]:
        return hyperep.loopback.run(lambda framework: function(KeptPlatform(framework)), len(process.ranks))


launcher = KeptLauncher()


class KeptPlatform(PlatformBase[Any]):
    def __init__(self, framework: Any) -> None:
        self._framework = framework

    @property
    def name(self) -> str:
        return "kept"

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def capabilities(self) -> Mapping[Capability, Support]:
        return CAPABILITIES

    @property
    def rank(self) -> int:
        return self._framework.rank

    @property
    def world_size(self) -> int:
        return self._framework.world_size

    @property
    def xp(self) -> Any:
        return self._framework.xp

    def new_group(self, ranks: Sequence[int]) -> Any:
        return self._framework.new_group(ranks)

    def group_size(self, group: Any = None) -> int:
        return self._framework.group_size(group)

    def is_tensor(self, value: object) -> bool:
        return self._framework.is_tensor(value)

    def from_host(self, array: Any) -> Any:
        return self._framework.from_host(array)

    def to_host(self, *tensors: Any) -> tuple[Any, ...]:
        return self._framework.to_host(*tensors)

    def all_to_all_single(
        self,
        x: Any,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return self._framework.all_to_all_single(x, output_splits, input_splits, group, async_op)

    def all_gather(self, x: Any, group: Any = None) -> Any:
        return self._framework.all_gather(x, group)

    def all_reduce(self, x: Any, group: Any = None, op: str = "sum") -> Any:
        return self._framework.all_reduce(x, group, op)

    def broadcast(self, x: Any, source: int = 0, group: Any = None) -> Any:
        return self._framework.broadcast(x, source, group)

    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:
        return self._framework.custom_vjp(forward, backward)

    def vjp(self, function: Callable[..., Any], *primals: Any, parameters: Sequence[Any] = ()) -> Any:
        return self._framework.vjp(function, *primals, parameters=parameters)

    def make_module(
        self,
        name: str,
        parameters: Mapping[str, Any],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, Any] | None = None,
        buffers: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> Any:
        return self._framework.make_module(
            name, parameters, forward, children=children, buffers=buffers, description=description
        )

    def named_modules(self, module: Any) -> dict[str, Any]:
        return self._framework.named_modules(module)

    def parameters(self, module: Any) -> dict[str, Any]:
        return self._framework.parameters(module)

    def buffers(self, module: Any) -> dict[str, Any]:
        return self._framework.buffers(module)

    def local(self, parameter: Any) -> Any:
        return self._framework.local(parameter)

    def sharding(self, parameter: Any) -> Sharding | None:
        return self._framework.sharding(parameter)

    def assign(self, parameter: Any, value: Any) -> None:
        self._framework.assign(parameter, value)

    def shard_parameter(self, module: Any, name: str, local: Any, sharding: Sharding) -> None:
        self._framework.shard_parameter(module, name, local, sharding)

    def wrap_forward(self, module: Any, wrapper: Callable[..., Any]) -> None:
        self._framework.wrap_forward(module, wrapper)
