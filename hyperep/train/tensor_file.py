# SPDX-License-Identifier: Apache-2.0
"""A safetensors file of whole tensors, of which every rank reads its part, and every tensor's digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hyperep.sharding import Sharding
from hyperep.train.durable import write_durably

__all__ = ["TensorFile", "digest", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], *, step: int) -> dict[str, str]:
    """Write a file, and return the digest of each tensor.

    Raises:
        ValueError: a tensor holds a value that is not finite; nothing is written then.
        OSError: the file cannot be written.
    """
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name!r} is no longer finite after step {step}, so nothing was written; try a lower --lr"
            )
    try:
        write_durably(path, lambda partial: save_file(dict(tensors), partial, metadata={"step": str(step)}))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return {name: digest(array) for name, array in tensors.items()}


def digest(array: np.ndarray) -> str:
    """SHA-256 of a tensor: of its dtype, its shape and its values."""
    found = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


class TensorFile:
    """An open file, whose tensors are compared with their digests as they are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds another step or other tensors than it should.
    """

    def __init__(self, path: Path, digests: Mapping[str, str], *, step: int) -> None:
        self.path, self._digests = path, digests
        if not path.is_file():
            raise FileNotFoundError(f"the checkpoint's file {path} is gone; use another checkpoint")
        try:
            opened: Any = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; use another checkpoint") from error
        self._open, self.names = opened, list(opened.keys())
        written = (opened.metadata() or {}).get("step")
        if written != str(step) or set(self.names) != set(digests):
            raise ValueError(
                f"{path} is of step {written} and holds {len(self.names)} tensors, but the checkpoint is of step "
                f"{step} and has {len(digests)}: they were not written together; use another checkpoint"
            )

    def __enter__(self) -> TensorFile:
        self._open.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._open.__exit__(*details)

    def check(self) -> None:
        """Compare every tensor with its digest."""
        for name in self.names:
            self._whole(name)

    def part(self, name: str, shape: tuple[int, ...], sharding: Sharding | None) -> np.ndarray:
        """This rank's part of a tensor whose whole shape must be *shape*."""
        if name not in self.names:
            raise ValueError(f"{self.path} lacks {name!r}; use another checkpoint")
        whole = self._whole(name)
        if whole.shape != shape:
            raise ValueError(
                f"{self.path}: {name!r} has shape {whole.shape}, but the model wants {shape}; "
                f"give the settings that it was trained with"
            )
        return whole if sharding is None else np.ascontiguousarray(whole[sharding.local_slices(shape)])

    def _whole(self, name: str) -> np.ndarray:
        whole: np.ndarray = self._open.get_tensor(name)
        if digest(whole) != self._digests[name]:
            raise ValueError(
                f"{self.path} is damaged: {name!r} is not what was written, by its digest; use another checkpoint"
            )
        return whole
