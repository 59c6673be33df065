# SPDX-License-Identifier: Apache-2.0
"""``state.json``: what a checkpoint is of, which files belong to it, and how to tell that they are unharmed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperep.train.durable import write_durably
from hyperep.train.settings import Settings

__all__ = ["DIRECTORY", "FILE_NAME", "Manifest", "manifest_in", "read_manifest", "write_manifest"]

DIRECTORY = "checkpoint"
"""Name of the checkpoint's directory in that of a run."""
FILE_NAME = "state.json"
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``state.json`` says."""

    directory: Path
    run: str
    """Id of the run that wrote it."""
    step: int
    settings: Settings
    text: str
    """SHA-256 of the training text."""
    model: str
    """Names of files in the directory."""
    optimizer: str
    digests: Mapping[str, Mapping[str, str]]
    """Of each tensor, by ``"model"`` or ``"optimizer"`` and the tensor's name."""

    @property
    def home(self) -> Path | None:
        """Directory of the run that wrote it; ``None`` for a checkpoint that lies elsewhere by itself."""
        return self.directory.parent if self.directory.name == DIRECTORY else None


def write_manifest(manifest: Manifest) -> None:
    """Make a checkpoint the one that counts: all its files must be on the disk."""
    content = {
        "format": _FORMAT,
        "run": manifest.run,
        "step": manifest.step,
        "model": manifest.model,
        "optimizer": manifest.optimizer,
        "text": manifest.text,
        "settings": manifest.settings.as_dict(),
        "digests": manifest.digests,
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_durably(manifest.directory / FILE_NAME, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_manifest(path: str | Path) -> Manifest:
    """Read what a checkpoint holds; *path* is its directory, or that of the run that wrote it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its ``state.json`` is not one that this version reads.
    """
    candidates = [Path(path) / DIRECTORY, Path(path)]
    directory = next((candidate for candidate in candidates if (candidate / FILE_NAME).is_file()), None)
    if directory is None:
        raise FileNotFoundError(
            f"{str(path)!r} holds no checkpoint: neither {candidates[0] / FILE_NAME} nor {candidates[1] / FILE_NAME} "
            f"exists; name the --out directory of an earlier run"
        )
    return manifest_in(directory)


def manifest_in(directory: Path) -> Manifest:
    """Read the ``state.json`` of this very directory.

    Raises:
        OSError: there is none, or it may not be read.
        ValueError: it is not one that this version reads.
    """
    # "." has no name, and no directory above it.
    directory = directory.resolve() if directory.name in ("", "..") else directory
    try:
        content = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this version reads format {_FORMAT}")
        return Manifest(
            directory=directory,
            run=_of(str, content, "run"),
            step=_of(int, content, "step"),
            settings=Settings.from_dict(_of(dict, content, "settings")),
            text=_of(str, content, "text"),
            model=_file(content, "model"),
            optimizer=_file(content, "optimizer"),
            digests={kind: _of(dict, _of(dict, content, "digests"), kind) for kind in ("model", "optimizer")},
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{directory / FILE_NAME} cannot be read: {type(error).__name__}: {error}") from error


def _of(kind: type, content: Mapping[str, Any], key: str) -> Any:
    value = content[key]
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {value!r}, not of type {kind.__name__}")
    return value


def _file(content: Mapping[str, Any], key: str) -> str:
    """A name, and no path: nothing outside the checkpoint is read, whoever wrote it."""
    name: str = _of(str, content, key)
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{key} is {name!r}, which is no name of a file in it")
    return name
