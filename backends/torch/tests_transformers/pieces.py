# SPDX-License-Identifier: Apache-2.0
"""How many numbers transformers reads from files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import modeling_utils


@contextlib.contextmanager
def numbers_read() -> Iterator[Callable[[], int]]:
    """Within it, the function tells how many were read from files of safetensors since it began."""
    counts: list[int] = []

    class Piece:
        def __init__(self, piece: Any) -> None:
            self.piece = piece

        def __getattr__(self, name: str) -> Any:
            return getattr(self.piece, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            found = self.piece[index]
            counts.append(found.numel())
            return found

    class Pieces:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, name: str) -> Any:
            return Piece(self.file.get_slice(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "safe_open", Pieces)
        yield lambda: sum(counts)
