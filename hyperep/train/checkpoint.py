# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole parameters and optimizer state in safetensors files, whatever the ranks that wrote them.

A directory holds ``model-STEP.safetensors`` with the parameters under their dotted paths,
``optimizer-STEP.safetensors``, and ``state.json``, which names the two. That file is replaced last and at once, so
that a run that is killed while it writes leaves the checkpoint before.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hyperep.platform.protocol import Platform
from hyperep.sharding import Sharding, whole_shape
from hyperep.train import whole_state
from hyperep.train.settings import Settings
from hyperep.train.trainer import TrainState

__all__ = ["DIRECTORY", "Manifest", "load", "read_manifest", "save"]

DIRECTORY = "checkpoint"
"""Name of the checkpoint's directory in that of a run."""
_MANIFEST = "state.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``state.json`` says."""

    directory: Path
    step: int
    settings: Settings
    model: str
    """Names of files in the directory."""
    optimizer: str


def save(directory: Path, platform: Platform[Any], state: TrainState, settings: Settings) -> None:
    """Write a checkpoint. Collective: every rank gives its shards, and rank 0 writes."""
    whole = whole_state.gather(platform, state)
    if platform.rank == 0:
        model = whole.pop("model")
        optimizer = {f"{kind}.{name}": array for kind, arrays in whole.items() for name, array in arrays.items()}
        _write(directory, state.step, settings, model, optimizer)


def _write(
    directory: Path, step: int, settings: Settings, model: dict[str, np.ndarray], optimizer: dict[str, np.ndarray]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    files = {"model": f"model-{step}.safetensors", "optimizer": f"optimizer-{step}.safetensors"}
    for kind, tensors in (("model", model), ("optimizer", optimizer)):
        partial = directory / f"{files[kind]}.partial"
        save_file(tensors, partial, metadata={"step": str(step)})
        os.replace(partial, directory / files[kind])
    content = {"format": _FORMAT, "step": step, **files, "settings": settings.as_dict()}
    partial = directory / f"{_MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / _MANIFEST)
    for old in directory.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink()


def read_manifest(path: str) -> Manifest:
    """Read what a checkpoint holds; *path* is its directory, or that of the run that wrote it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its ``state.json`` is not one that this version reads.
    """
    candidates = [Path(path) / DIRECTORY, Path(path)]
    directory = next((candidate for candidate in candidates if (candidate / _MANIFEST).is_file()), None)
    if directory is None:
        raise FileNotFoundError(
            f"{path!r} holds no checkpoint: neither {candidates[0] / _MANIFEST} nor {candidates[1] / _MANIFEST} "
            f"exists; name the --out directory of an earlier run"
        )
    try:
        content = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this version reads format {_FORMAT}")
        return Manifest(
            directory=directory,
            step=int(content["step"]),
            settings=Settings.from_dict(content["settings"]),
            model=content["model"],
            optimizer=content["optimizer"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / _MANIFEST} cannot be read: {type(error).__name__}: {error}") from error


def load(manifest: Manifest, platform: Platform[Any], state: TrainState, dtype: str) -> TrainState:
    """Put a checkpoint into a model of *dtype*, in place, however it is sharded; each rank reads its own slices.

    No communication.

    Returns:
        The state after the checkpoint's step.

    Raises:
        FileNotFoundError: a file that the checkpoint names is gone.
        ValueError: a file is damaged, or the model has other parameters or shapes.
    """
    with ExitStack() as stack:
        model, optimizer = (
            stack.enter_context(_File(manifest.directory / name)) for name in (manifest.model, manifest.optimizer)
        )
        wanted, found = set(state.parameters), set(model.names)
        if wanted != found:
            raise ValueError(
                f"{model.path} does not fit the model: it lacks {sorted(wanted - found)} and holds unknown "
                f"{sorted(found - wanted)}; give the settings that it was trained with"
            )

        def part(kind: str, name: str) -> np.ndarray:
            parameter = state.parameters[name]
            shape, sharding = whole_shape(platform, parameter), platform.sharding(parameter)
            if kind == "model":
                return model.part(name, shape, sharding)
            return optimizer.part(f"{kind}.{name}", shape, sharding)

        # The run that wrote it may have had another precision.
        return whole_state.place(platform, state, part, step=manifest.step, dtype=dtype)


class _File:
    """An open safetensors file, of which parts of tensors are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"the checkpoint's file {path} is gone; use another checkpoint")
        try:
            opened: Any = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; use another checkpoint") from error
        self._open, self.names = opened, list(opened.keys())

    def __enter__(self) -> _File:
        self._open.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._open.__exit__(*details)

    def part(self, name: str, shape: tuple[int, ...], sharding: Sharding | None) -> np.ndarray:
        """This rank's part of a tensor whose whole shape must be *shape*."""
        if name not in self.names:
            raise ValueError(f"{self.path} lacks {name!r}; use another checkpoint")
        stored = self._open.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{self.path}: {name!r} has shape {tuple(stored.get_shape())}, but the model wants {shape}; "
                f"give the settings that it was trained with"
            )
        slices = tuple(slice(0, n) for n in shape) if sharding is None else sharding.local_slices(shape)
        return np.ascontiguousarray(stored[slices])
