# SPDX-License-Identifier: Apache-2.0
"""``NpuArrayNamespace``: the array namespace of PyTorch without the type that Ascend does not compute with."""

from __future__ import annotations

from typing import Any

from hyperep_torch.array_namespace import ArrayNamespace

__all__ = ["NpuArrayNamespace"]


class NpuArrayNamespace(ArrayNamespace):
    """As its base, without float64: who asks for it is told at once, and not by an operator that fails later."""

    @property
    def float64(self) -> Any:  # noqa: D102
        raise AttributeError("float64")

    def __getattr__(self, name: str) -> Any:
        if name == "float64":
            raise AttributeError("this platform does not support float64 (Capability.FLOAT64); use float32")
        return super().__getattr__(name)
