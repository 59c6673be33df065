# SPDX-License-Identifier: Apache-2.0
"""Buffers that keep their dtype, because they add up steps that a narrower one would lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["KeepsState"]


class KeepsState:
    """Mixed in before ``nn.Module``: the module's own buffers have one dtype, whatever it is cast to or loaded from."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What every cast and every move goes through; children first, each by this method of its own."""
        own = {id(buffer) for buffer in self._buffers.values()}

        def keeping(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            if id(tensor) not in own or converted.dtype == tensor.dtype:
                return converted
            # From the old values: those of the new dtype may have lost digits.
            return tensor.to(device=converted.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keeping, recurse=False)  # type: ignore[misc]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load as ever; ``assign=True`` takes tensors as the checkpoint has them, of buffers the values alone."""
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(*arguments)  # type: ignore[misc]
        for name, dtype in dtypes.items():
            self._buffers[name] = self._buffers[name].to(dtype)
