# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole parameters and optimizer state in safetensors files, whatever the ranks that wrote them.

A directory holds ``model-STEP.safetensors`` with the parameters under their dotted paths,
``optimizer-STEP.safetensors``, and ``state.json``, which names the two. That file is replaced last and at once, when
the others are on the disk, so that a run that is killed while it writes leaves the checkpoint before.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hyperep.platform.protocol import Platform
from hyperep.sharding import whole_shape
from hyperep.train import whole_state
from hyperep.train.agreement import agreed
from hyperep.train.durable import make_directory
from hyperep.train.manifest import DIRECTORY, FILE_NAME, Manifest, manifest_in, read_manifest, write_manifest
from hyperep.train.settings import Settings
from hyperep.train.tensor_file import TensorFile, write_tensors
from hyperep.train.trainer import TrainState

__all__ = ["DIRECTORY", "Manifest", "check", "load", "read_manifest", "remove", "save", "sweep"]

_TENSORS = re.compile(r"(model|optimizer)-\d+\.safetensors(\.partial)?")
_STATE = re.compile(rf"{re.escape(FILE_NAME)}(\.partial)?")


def save(
    directory: Path, platform: Platform[Any], state: TrainState, settings: Settings, *, run: str, text: str
) -> None:
    """Write a checkpoint. Collective: every rank gives its shards, and rank 0 writes.

    Args:
        directory: of the checkpoint.
        platform: of this rank.
        state: what to write.
        settings: of the run.
        run: its id.
        text: SHA-256 of what it trains on.

    Raises:
        ValueError: a tensor is not finite; on every rank, and the checkpoint before stays.
        OSError: it cannot be written; likewise.
    """
    whole = whole_state.gather(platform, state)

    def write() -> None:
        model = whole["model"]
        optimizer = {f"{kind}.{name}": x for kind in ("mean", "square") for name, x in whole[kind].items()}
        _write(directory, state.step, settings, {"model": model, "optimizer": optimizer}, run=run, text=text)

    agreed(platform, write if platform.rank == 0 else lambda: None)


def _write(
    directory: Path, step: int, settings: Settings, kinds: dict[str, dict[str, np.ndarray]], *, run: str, text: str
) -> None:
    make_directory(directory)
    files = {kind: f"{kind}-{step}.safetensors" for kind in kinds}
    digests = {kind: write_tensors(directory / files[kind], kinds[kind], step=step) for kind in kinds}
    write_manifest(
        Manifest(directory=directory, run=run, step=step, settings=settings, text=text, digests=digests, **files)
    )
    sweep(directory)


def sweep(directory: Path) -> None:
    """Remove what no longer belongs to a checkpoint: the one before, and leftovers of a save that was killed.

    Where no ``state.json`` can be read, nothing is.
    """
    try:
        manifest = manifest_in(directory)
    except (ValueError, OSError):
        return
    kept = {FILE_NAME, manifest.model, manifest.optimizer}
    _remove(directory, lambda name: name not in kept)


def remove(directory: Path) -> None:
    """Remove a whole checkpoint, and its directory unless something else is in it."""
    _remove(directory, lambda name: True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _remove(directory: Path, which: Callable[[str], bool]) -> None:
    """Remove those files of checkpoints, and no other ones, whose name *which* says yes to; ``state.json`` first."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    ours = [name for name in names if _STATE.fullmatch(name) or _TENSORS.fullmatch(name)]
    for name in sorted(filter(which, ours), key=lambda name: name != FILE_NAME):
        (directory / name).unlink(missing_ok=True)


def check(manifest: Manifest) -> None:
    """Read a checkpoint as a whole and compare it with its digests.

    Raises:
        FileNotFoundError: a file that it names is gone.
        ValueError: a file is damaged.
    """
    for kind in ("model", "optimizer"):
        with _open(manifest, kind) as file:
            file.check()


def load(manifest: Manifest, platform: Platform[Any], state: TrainState, dtype: str) -> TrainState:
    """Put a checkpoint into a model of *dtype*, in place, however it is sharded; each rank keeps its own slices.

    No communication. Every rank reads whole tensors, for their digests; one at a time.

    Returns:
        The state after the checkpoint's step.

    Raises:
        FileNotFoundError: a file that the checkpoint names is gone.
        ValueError: a file is damaged, or the model has other parameters or shapes.
    """
    with ExitStack() as stack:
        model, optimizer = (stack.enter_context(_open(manifest, kind)) for kind in ("model", "optimizer"))
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


def _open(manifest: Manifest, kind: str) -> TensorFile:
    name = manifest.model if kind == "model" else manifest.optimizer
    return TensorFile(manifest.directory / name, manifest.digests[kind], step=manifest.step)
