# SPDX-License-Identifier: Apache-2.0
"""``TorchPlatform``: PyTorch as one rank of a world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh as NativeMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle as NativeStyle

from hyperep.mesh import DeviceMesh
from hyperep.platform.base import PlatformBase
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.protocol import Backward, Forward
from hyperep.sharding import Sharding
from hyperep.styles.style import ParallelStyle
from hyperep_torch import autodiff, collectives, grouped, groups, modules, row_sums, rows, sharded, swiglu, transfer
from hyperep_torch.array_namespace import ArrayNamespace
from hyperep_torch.collectives import TorchWork
from hyperep_torch.device import lies_on
from hyperep_torch.instruments import Instruments
from hyperep_torch.local_parts import local_part
from hyperep_torch.native import NativeTraining
from hyperep_torch.opened import call_with_given, mark_shard
from hyperep_torch.spec import CAPABILITIES
from hyperep_torch.world import World, join_world
from hyperep_torch.wrapped import wrap_forward

__all__ = ["TorchPlatform", "join"]


def join(device: str | None = None, timeout: float | None = None) -> TorchPlatform:
    """The platform of this process: part of its process group or launch, or a single rank. See :func:`join_world`."""
    return TorchPlatform(join_world(device, timeout))


class TorchPlatform(PlatformBase[torch.Tensor]):
    """PyTorch on the device of a :class:`World`; the meaning of each member is in the protocol."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._xp = ArrayNamespace(world.device)
        self._meshes = sharded.Meshes(self, world)

    # ---------------------------------------------------------------------------------- identity and world
    @property
    def name(self) -> str:  # noqa: D102
        return "torch"

    @property
    def device(self) -> str:  # noqa: D102
        return str(self._world.device)

    @property
    def torch_device(self) -> torch.device:
        """The device that tensors live on."""
        return self._world.device

    @property
    def capabilities(self) -> Mapping[Capability, Support]:  # noqa: D102
        device = self._world.device
        native = any(grouped.has_native_kernel(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        return {
            **CAPABILITIES,
            Capability.GROUPED_MATMUL: Support.FULL if native else Support.EMULATED,
            # NCCL wants the collectives of one device in one order, whichever group they belong to.
            Capability.THREADS: Support.UNSUPPORTED if self._world.kind.is_accelerator else Support.FULL,
        }

    @property
    def rank(self) -> int:  # noqa: D102
        return self._world.rank

    @property
    def world_size(self) -> int:  # noqa: D102
        return self._world.size

    def new_group(self, ranks: Sequence[int]) -> Any:  # noqa: D102
        members = [int(rank) for rank in ranks]
        if not members or members != sorted(set(members)) or members[0] < 0 or members[-1] >= self.world_size:
            raise ValueError(
                f"new_group({members}): give one or more ranks below {self.world_size}, each once and ascending, "
                "which is how PyTorch numbers the ranks of a group"
            )
        if self._world.group is groups.SELF:
            return groups.SELF
        return dist.new_group(members, timeout=self._world.timeout, pg_options=self._group_options())

    def _group_options(self) -> Any:
        """Options of the backend for a group that is made; ``None`` for its defaults."""
        return None

    def group_size(self, group: Any = None) -> int:  # noqa: D102
        return groups.group_size(self._group(group))

    def _group(self, group: Any) -> Any:
        return self._world.group if group is None else group

    # ----------------------------------------------------------------------------------------------- arrays
    @property
    def xp(self) -> ArrayNamespace:  # noqa: D102
        return self._xp

    def is_tensor(self, value: object) -> bool:  # noqa: D102
        return isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and lies_on(value, self._world.device)

    def from_host(self, array: np.ndarray) -> torch.Tensor:  # noqa: D102
        return transfer.from_host(array, self._world.device)

    def to_host(self, *tensors: torch.Tensor) -> tuple[np.ndarray, ...]:  # noqa: D102
        return transfer.to_host(tensors, self._world.device)

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return x.detach()

    # ------------------------------------------------------------------------------------------------- rows
    def permute_rows(self, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows.permute_rows(x, index, inverse)

    def sum_rows(  # noqa: D102
        self, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if row_sums.can_fuse(x, index, weights):
            return rows.sum_rows(x, index, inverse, weights)
        return super().sum_rows(x, index, inverse, weights)

    def grouped_matmul(  # noqa: D102
        self, x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
    ) -> torch.Tensor:
        return grouped.grouped_matmul(x, weight, group_sizes)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return swiglu.swiglu(gate, up)

    def grouped_swiglu(  # noqa: D102
        self, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, group_sizes: torch.Tensor
    ) -> torch.Tensor:
        if not swiglu.can_fuse(x, w1):
            return super().grouped_swiglu(x, w1, w2, w3, group_sizes)
        return swiglu.grouped_swiglu(x, w1, w2, w3, group_sizes)

    # ------------------------------------------------------------------------------------------ collectives
    def all_to_all_single(  # noqa: D102
        self,
        x: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> torch.Tensor | TorchWork:
        work = collectives.all_to_all_single(x, output_splits, input_splits, self._group(group))
        return work if async_op else work.wait()

    def differentiable_all_to_all_single(  # noqa: D102
        self, x: torch.Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: Any = None
    ) -> torch.Tensor:
        return rows.exchange_rows(x, input_splits, output_splits, self._group(group))

    def all_gather(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:  # noqa: D102
        return collectives.all_gather(x, self._group(group))

    def reduce_scatter(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:  # noqa: D102
        return collectives.reduce_scatter(x, self._group(group))

    def all_reduce(self, x: torch.Tensor, group: Any = None, op: str = "sum") -> torch.Tensor:  # noqa: D102
        return collectives.all_reduce(x, self._group(group), op)

    def broadcast(self, x: torch.Tensor, source: int = 0, group: Any = None) -> torch.Tensor:  # noqa: D102
        return collectives.broadcast(x, source, self._group(group))

    def copy_to_group(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:  # noqa: D102
        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[torch.Tensor]:
            return (self.all_reduce(cotangents[0], group),)

        # Autograd makes a view of an input that is returned as it is, which saves the default's copy.
        return autodiff.custom_vjp(lambda x: (x, ()), backward)(x)

    # ---------------------------------------------------------------------------------------------- modules
    def make_module(  # noqa: D102
        self,
        name: str,
        parameters: Mapping[str, torch.Tensor],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, nn.Module] | None = None,
        buffers: Mapping[str, torch.Tensor] | None = None,
        description: str = "",
    ) -> nn.Module:
        return modules.NeutralModule(name, parameters, forward, children or {}, buffers or {}, description)

    def named_modules(self, module: nn.Module) -> dict[str, nn.Module]:  # noqa: D102
        return dict(_require_module(module).named_modules())

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:  # noqa: D102
        return dict(_require_module(module).named_parameters())

    def buffers(self, module: nn.Module) -> dict[str, torch.Tensor]:  # noqa: D102
        return dict(_require_module(module).named_buffers())

    def local(self, parameter: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return local_part(parameter)

    def sharding(self, parameter: torch.Tensor) -> Sharding | None:  # noqa: D102
        return self._meshes.sharding(parameter) if isinstance(parameter, DTensor) else None

    def assign(self, parameter: torch.Tensor, value: torch.Tensor) -> None:  # noqa: D102
        with torch.no_grad():
            local = local_part(parameter)
            if local.shape != value.shape:
                raise ValueError(f"assign: a value of shape {tuple(value.shape)} for a part of {tuple(local.shape)}")
            local.copy_(value)

    def shard_parameter(  # noqa: D102
        self, module: nn.Module, name: str, local: torch.Tensor, sharding: Sharding
    ) -> None:
        if not modules.is_laid_out(self, module, name, sharding):
            modules.replace_by_shard(module, name, lambda: self._meshes.from_local(modules.own_copy(local), sharding))
        mark_shard(module, name)

    def from_local(self, local: torch.Tensor, sharding: Sharding) -> DTensor:  # noqa: D102
        return self._meshes.from_local(local, sharding)

    def wrap_forward(self, module: nn.Module, wrapper: Callable[..., Any]) -> None:  # noqa: D102
        wrap_forward(module, wrapper)

    def native_mesh(self, mesh: DeviceMesh) -> NativeMesh:
        """PyTorch's own mesh of a core mesh; made of its groups if it has none."""
        return self._meshes.native(mesh)

    def adopt_style(self, style: object) -> ParallelStyle | None:
        """The core's view of a style of PyTorch's own; ``None`` if *style* is not one."""
        if not isinstance(style, NativeStyle):
            return None
        from hyperep_torch.styles import BorrowedStyle

        return BorrowedStyle(style)

    def adopt_mesh(self, mesh: object) -> DeviceMesh | None:  # noqa: D102
        return self._meshes.adopt(mesh) if isinstance(mesh, NativeMesh) else None

    # --------------------------------------------------------------------------------------------- autodiff
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:  # noqa: D102
        return autodiff.custom_vjp(forward, backward)

    def functional_call(  # noqa: D102
        self,
        module: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        function: Callable[..., Any],
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        return call_with_given(_require_module(module), parameters, function, *inputs, **kwargs)

    def vjp(  # noqa: D102
        self, function: Callable[..., Any], *primals: torch.Tensor, parameters: Sequence[torch.Tensor] = ()
    ) -> tuple[Any, Callable[..., tuple[torch.Tensor, ...]]]:
        return autodiff.vjp(function, *primals, parameters=parameters)

    # --------------------------------------------------------------------------- what is no member of the protocol
    @property
    def native_training(self) -> NativeTraining:
        """PyTorch's own backward, optimizer and state, for the conformance suite."""
        return NativeTraining()

    @property
    def instruments(self) -> Instruments:
        """What ``hyperep bench`` can learn here about memory; no member of the protocol."""
        return Instruments(self._world.device)

    # -------------------------------------------------------------------------------------------- as a value
    def __deepcopy__(self, memo: object) -> TorchPlatform:
        # Modules that are deep-copied may hold the platform in their wrappers; process groups cannot be copied.
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.world_size} on {self.device})"


def _require_module(module: object) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"a {type(module).__module__}.{type(module).__qualname__} is no torch.nn.Module; make modules and meshes "
            "with the same platform"
        )
    return module
