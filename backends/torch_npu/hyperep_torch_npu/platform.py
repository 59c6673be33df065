# SPDX-License-Identifier: Apache-2.0
"""``TorchNpuPlatform``: PyTorch on Ascend as one rank of a world.

All that is not said here is :class:`hyperep_torch.platform.TorchPlatform`'s: modules, DTensors, autodiff, and the
collectives, each of which is issued asynchronously and then waited for. On Ascend that wait is what makes a result
visible: HCCL runs on streams of its own, and unlike NCCL a call that blocks does not order the work after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hyperep_torch.platform import TorchPlatform
from hyperep_torch.world import World, join_world
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep_torch_npu import grouped, rows
from hyperep_torch_npu.array_namespace import NpuArrayNamespace
from hyperep_torch_npu.device import NPU
from hyperep_torch_npu.probe import is_emulated
from hyperep_torch_npu.spec import CAPABILITIES

__all__ = ["TorchNpuPlatform", "join"]


def join(timeout: float | None = None, hccl_buffer_mb: int | None = None) -> TorchNpuPlatform:
    """The platform of this process: part of its process group or launch, or a single rank.

    Args:
        timeout: deadline in seconds of collectives, for the groups that are made here; by default ``HYPEREP_TIMEOUT``,
            or ten minutes.
        hccl_buffer_mb: size in MB of HCCL's buffers of each group that is made for a mesh, the same on all ranks; by
            default what ``HCCL_BUFFSIZE`` says, or HCCL's own 200.

    Raises:
        ValueError: no Ascend device answers, the process group that is there is not of HCCL, the environment
            describes half a launch, or the buffer is smaller than 1 MB.
    """
    if hccl_buffer_mb is not None and hccl_buffer_mb < 1:
        raise ValueError(f"hccl_buffer_mb={hccl_buffer_mb}: give a whole number of MB, 1 or more, or None")
    return TorchNpuPlatform(join_world("npu", timeout, kinds=(NPU,)), hccl_buffer_mb)


class TorchNpuPlatform(TorchPlatform):
    """PyTorch on an Ascend device; the meaning of each member is in the protocol."""

    def __init__(self, world: World, hccl_buffer_mb: int | None = None) -> None:
        super().__init__(world)
        self._hccl_buffer_mb = hccl_buffer_mb
        self._xp = NpuArrayNamespace(world.device)

    @property
    def name(self) -> str:  # noqa: D102
        return "torch_npu"

    @property
    def device(self) -> str:  # noqa: D102
        # Reports and matrices print this: nobody may take a result of the emulated device for one of Ascend.
        return f"emulated device {super().device}" if is_emulated() else super().device

    @property
    def capabilities(self) -> Mapping[Capability, Support]:  # noqa: D102
        return CAPABILITIES

    def from_host(self, array: np.ndarray) -> torch.Tensor:  # noqa: D102
        if array.dtype == np.float64:
            raise UnsupportedCapability(self.name, Capability.FLOAT64, "HCCL reduces no float64; cast it to float32")
        return super().from_host(array)

    def _group_options(self) -> Any:
        if self._hccl_buffer_mb is None:
            return None
        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": self._hccl_buffer_mb}
        return options

    def permute_rows(self, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows.permute_rows(x, index, inverse)

    def grouped_matmul(  # noqa: D102
        self, x: torch.Tensor, weight: torch.Tensor, group_sizes: torch.Tensor
    ) -> torch.Tensor:
        return grouped.grouped_matmul(x, weight, group_sizes)
