# SPDX-License-Identifier: Apache-2.0
"""``MindSporePlatform``: MindSpore as one rank of a world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Backward, Forward
from hyperep.sharding import ShardedTensor, Sharding
from hyperep_mindspore import autodiff, collectives, grouped, modules, transfer
from hyperep_mindspore.array_namespace import ArrayNamespace
from hyperep_mindspore.collectives import MindSporeWork
from hyperep_mindspore.groups import Group, new_group, world_group
from hyperep_mindspore.kernels import kernels_of
from hyperep_mindspore.native import NativeTraining
from hyperep_mindspore.probe import is_emulated
from hyperep_mindspore.spec import CAPABILITIES
from hyperep_mindspore.world import World, join_world

__all__ = ["MindSporePlatform", "join"]

_ON_CPU = {
    Capability.ALL_TO_ALL: Support.EMULATED,  # messages between pairs
    Capability.REDUCE_SCATTER: Support.EMULATED,  # an all-to-all, and a sum
    Capability.BFLOAT16: Support.UNSUPPORTED,  # hardly any kernels: no comparison, no product, no exponential
    Capability.GROUPED_MATMUL: Support.EMULATED,  # one product a group
}
"""What the CPU does not do natively."""

_ON_GPU = {
    Capability.GROUPED_MATMUL: Support.EMULATED,  # one product a group
}
"""The same of a GPU."""

_ON_ASCEND = {
    Capability.FLOAT64: Support.UNSUPPORTED,  # HCCL reduces none, and the device multiplies none
}
"""What Ascend does not do at all."""

_LESS = {"cpu": _ON_CPU, "gpu": _ON_GPU, "ascend": _ON_ASCEND}


def join(device: str | None = None, hccl_buffer_mb: int | None = None) -> MindSporePlatform:
    """The platform of this process: part of its launch, or a single rank. See :func:`join_world`.

    Args:
        device: as for :func:`join_world`.
        hccl_buffer_mb: on Ascend, size in MB of HCCL's buffers of each group that is made for a mesh, the same on all
            ranks; by default what ``HCCL_BUFFSIZE`` says, or HCCL's own 200.

    Raises:
        ValueError: of :func:`join_world`; or the buffer is smaller than 1 MB, or the device is not Ascend.
    """
    if hccl_buffer_mb is not None and hccl_buffer_mb < 1:
        raise ValueError(f"hccl_buffer_mb={hccl_buffer_mb}: give a whole number of MB, 1 or more, or None")
    world = join_world(device)
    if hccl_buffer_mb is not None and world.device != "ascend":
        raise ValueError(f"hccl_buffer_mb={hccl_buffer_mb} on {world.device}: HCCL is Ascend's; leave it out")
    return MindSporePlatform(world, hccl_buffer_mb)


class MindSporePlatform(PlatformBase[Tensor]):
    """MindSpore on the device of a :class:`World`; the meaning of each member is in the protocol."""

    def __init__(self, world: World, hccl_buffer_mb: int | None = None) -> None:
        self._world = world
        self._hccl_buffer_mb = hccl_buffer_mb
        self._world_group = world_group(world)
        self._capabilities = {**CAPABILITIES, **_LESS.get(world.device, {})}
        self._kernels = kernels_of(world.device)
        self._xp = ArrayNamespace(self.name, self._capabilities, self._kernels)

    # ---------------------------------------------------------------------------------- identity and world
    @property
    def name(self) -> str:  # noqa: D102
        return "mindspore"

    @property
    def device(self) -> str:  # noqa: D102
        # Reports and matrices print this: nobody may take a result of the emulated device for one of Ascend.
        emulated = self._world.device == "ascend" and is_emulated()
        return f"emulated device {self._world.device}" if emulated else self._world.device

    @property
    def capabilities(self) -> Mapping[Capability, Support]:  # noqa: D102
        return self._capabilities

    @property
    def rank(self) -> int:  # noqa: D102
        return self._world.rank

    @property
    def world_size(self) -> int:  # noqa: D102
        return self._world.size

    def new_group(self, ranks: Sequence[int]) -> Group:  # noqa: D102
        return new_group(self._world, ranks, self._hccl_buffer_mb)

    def group_size(self, group: Group | None = None) -> int:  # noqa: D102
        return self._group(group).size

    def _group(self, group: Group | None) -> Group:
        return self._world_group if group is None else group

    # ----------------------------------------------------------------------------------------------- arrays
    @property
    def xp(self) -> ArrayNamespace:  # noqa: D102
        return self._xp

    def is_tensor(self, value: object) -> bool:  # noqa: D102
        return isinstance(value, Tensor)

    def from_host(self, array: np.ndarray) -> Tensor:  # noqa: D102
        if array.dtype == np.float64 and self._capabilities[Capability.FLOAT64] is Support.UNSUPPORTED:
            raise UnsupportedCapability(self.name, Capability.FLOAT64, "HCCL reduces no float64; cast it to float32")
        return transfer.from_host(array)

    def to_host(self, *tensors: Tensor) -> tuple[np.ndarray, ...]:  # noqa: D102
        return transfer.to_host(tensors, self._world.device)

    def stop_gradient(self, x: Tensor) -> Tensor:  # noqa: D102
        return ops.stop_gradient(x)

    # ------------------------------------------------------------------------------------------------- rows
    def sum_rows(  # noqa: D102
        self, x: Tensor, index: Tensor, inverse: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        return self._kernels.sum_rows(self, x, index, inverse, weights)

    def grouped_matmul(self, x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:  # noqa: D102
        return grouped.grouped_matmul(self._kernels.products, x, weight, group_sizes)

    def grouped_swiglu(  # noqa: D102
        self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, group_sizes: Tensor
    ) -> Tensor:
        return grouped.grouped_swiglu(self._kernels.products, x, w1, w2, w3, group_sizes)

    # ------------------------------------------------------------------------------------------ collectives
    def all_to_all_single(  # noqa: D102
        self,
        x: Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group | None = None,
        async_op: bool = False,
    ) -> Tensor | MindSporeWork:
        work = collectives.all_to_all_single(x, output_splits, input_splits, self._group(group), self._world.device)
        return work if async_op else work.wait()

    def all_gather(self, x: Tensor, group: Group | None = None) -> Tensor:  # noqa: D102
        return collectives.all_gather(x, self._group(group), self._world.device)

    def reduce_scatter(self, x: Tensor, group: Group | None = None) -> Tensor:  # noqa: D102
        return collectives.reduce_scatter(x, self._group(group), self._world.device)

    def all_reduce(self, x: Tensor, group: Group | None = None, op: str = "sum") -> Tensor:  # noqa: D102
        return collectives.all_reduce(x, self._group(group), op, self._world.device)

    def broadcast(self, x: Tensor, source: int = 0, group: Group | None = None) -> Tensor:  # noqa: D102
        return collectives.broadcast(x, source, self._group(group), self._world.device)

    # ---------------------------------------------------------------------------------------------- modules
    def make_module(  # noqa: D102
        self,
        name: str,
        parameters: Mapping[str, Tensor],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, nn.Cell] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        description: str = "",
    ) -> nn.Cell:
        return modules.NeutralCell(name, parameters, forward, children or {}, buffers or {}, description)

    def named_modules(self, module: nn.Cell) -> dict[str, nn.Cell]:  # noqa: D102
        return dict(module.cells_and_names())

    def parameters(self, module: nn.Cell) -> dict[str, Parameter]:  # noqa: D102
        return {name: p for name, p in module.parameters_and_names() if p.requires_grad}

    def buffers(self, module: nn.Cell) -> dict[str, Parameter]:  # noqa: D102
        return {name: p for name, p in module.parameters_and_names() if not p.requires_grad}

    def local(self, parameter: Parameter | ShardedTensor) -> Tensor:  # noqa: D102
        return parameter.local if isinstance(parameter, ShardedTensor) else parameter

    def sharding(self, parameter: Parameter | ShardedTensor) -> Sharding | None:  # noqa: D102
        return parameter.sharding if isinstance(parameter, ShardedTensor) else modules.sharding_of(parameter)

    def assign(self, parameter: Parameter, value: Tensor) -> None:  # noqa: D102
        if tuple(parameter.shape) != tuple(value.shape):
            raise ValueError(f"assign: a value of shape {tuple(value.shape)} for a part of {tuple(parameter.shape)}")
        parameter.set_data(self._kernels.copied(value))

    def shard_parameter(  # noqa: D102
        self, module: nn.Cell, name: str, local: Tensor, sharding: Sharding
    ) -> None:
        modules.shard_parameter(module, name, local, sharding)

    def wrap_forward(self, module: nn.Cell, wrapper: Callable[..., Any]) -> None:  # noqa: D102
        modules.wrap_construct(module, wrapper)

    # --------------------------------------------------------------------------------------------- autodiff
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:  # noqa: D102
        return autodiff.custom_vjp(forward, backward)

    def functional_call(  # noqa: D102
        self,
        module: nn.Cell,
        parameters: Mapping[str, Tensor],
        function: Callable[..., Any],
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        with modules.given(module, parameters):
            return function(*inputs, **kwargs)

    def vjp(  # noqa: D102
        self, function: Callable[..., Any], *primals: Tensor, parameters: Sequence[Parameter] = ()
    ) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
        return autodiff.vjp(function, *primals, parameters=parameters)

    @property
    def native_training(self) -> NativeTraining:
        """MindSpore's own gradients, optimizer and state, for the conformance suite; no member of the protocol."""
        return NativeTraining()

    # -------------------------------------------------------------------------------------------- as a value
    def __deepcopy__(self, memo: object) -> MindSporePlatform:
        # Cells that are deep-copied may hold the platform in their wrappers; process groups cannot be copied.
        return self

    def __repr__(self) -> str:
        return f"MindSporePlatform(rank {self.rank} of {self.world_size} on {self.device})"
