# SPDX-License-Identifier: Apache-2.0
"""The Ascend device, as one more of PyTorch's kinds of devices."""

from __future__ import annotations

import torch_npu  # noqa: F401  (makes torch.npu, where torch does not import it by itself)
from hyperep_torch.device import DeviceKind

__all__ = ["NPU"]

NPU = DeviceKind(type="npu", backend="hccl")
