# SPDX-License-Identifier: Apache-2.0
"""An output directory belongs to one run, and one process at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperep.train import checkpoint, manifest, metrics, recorder
from hyperep.train.durable import make_directory
from hyperep.train.manifest import Manifest
from hyperep.writable import require_writable_folder

__all__ = ["PAGE", "PICTURES", "check_claim", "claimed", "run_id"]

PAGE = "report.html"
PICTURES = ("loss.png", "expert_load.png", "rank_load.png")
"""What a run leaves besides its metrics, its trace and its checkpoint."""

_UNKNOWN = "unknown"
"""Stands for the id of a run that cannot be read."""


def run_id(out: Path, resume: Manifest | None) -> str:
    """The id of a run that writes to *out*: that of the one it goes on from, if it goes on in its directory."""
    if resume is not None and resume.home is not None and resume.home.resolve() == out.resolve():
        return resume.run
    return uuid.uuid4().hex[:12]


def check_claim(out: Path, run: str, *, overwrite: bool) -> None:
    """Check that :func:`claimed` would succeed; writes nothing.

    Raises:
        ValueError: as :func:`claimed` does.
    """
    _require_writable(out)
    if out.is_dir():
        with _locked(out):
            _require_own(out, run, overwrite)


@contextmanager
def claimed(out: Path, run: str, *, overwrite: bool) -> Iterator[None]:
    """Hold *out* for a run alone. What a killed process has left half written there is removed.

    Args:
        out: the directory; it is made where it does not exist.
        run: id of the run.
        overwrite: remove what another run has left.

    Raises:
        ValueError: it is no directory or cannot be written, it holds another run, or another process holds it.
    """
    _require_writable(out)
    make_directory(out)
    with _locked(out):
        _require_own(out, run, overwrite)
        _clear(out, run)
        checkpoint.sweep(out / checkpoint.DIRECTORY)
        yield


def _require_own(out: Path, run: str, overwrite: bool) -> None:
    others = sorted(set(_runs(out).values()) - {run})
    if others and not overwrite:
        raise ValueError(
            f"out={str(out)!r} holds another run ({', '.join(others)}); choose another --out, go on with that run by "
            f"--resume, or replace it with --overwrite"
        )


def _runs(out: Path) -> dict[str, str]:
    """The id of the run that each part in *out* is of: its metrics, its checkpoint."""
    found = {}
    if (out / metrics.FILE_NAME).exists():
        try:
            records = metrics.read_metrics(out, last_step=1 << 62)
            ids = {str(record.get("run", _UNKNOWN)) for record in records}
        except (ValueError, OSError):
            ids = {_UNKNOWN}
        if ids:  # a run that was killed before its first step has left nothing that could be lost
            found["metrics"] = ids.pop() if len(ids) == 1 else _UNKNOWN
    if (out / checkpoint.DIRECTORY / manifest.FILE_NAME).exists():
        try:
            found["checkpoint"] = manifest.manifest_in(out / checkpoint.DIRECTORY).run
        except (ValueError, OSError):
            found["checkpoint"] = _UNKNOWN
    return found


def _clear(out: Path, run: str) -> None:
    """Remove what is of another run than *run*."""
    others = [part for part, id in _runs(out).items() if id != run]
    if "checkpoint" in others:
        checkpoint.remove(out / checkpoint.DIRECTORY)
    if "metrics" in others:
        (out / metrics.FILE_NAME).unlink()
    if others:
        for name in (*PICTURES, PAGE, recorder.FILE_NAME):
            (out / name).unlink(missing_ok=True)


def _require_writable(out: Path) -> None:
    """Check that files can be made in *out*, or in what is there of the directories above it."""
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        what = "is a file" if there.is_file() else "is no directory"
        raise ValueError(f"out={str(out)!r}: {there} {what}; give --out a directory, or a name that is free")
    inside = out / checkpoint.DIRECTORY
    for folder in (there, *([inside] if os.path.lexists(inside) else [])):
        require_writable_folder(folder, f"out={str(out)!r}", "choose another --out")
    if (out / metrics.FILE_NAME).is_dir():
        raise ValueError(f"out={str(out)!r}: {out / metrics.FILE_NAME} is a directory; choose another --out")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold a lock on *out* that the kernel takes back when this process ends, however it ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(out) from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            # Network file systems lock no directories: a file stands for it.
            os.close(descriptor)
            descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(out) from None
        yield
    finally:
        os.close(descriptor)


def _in_use(out: Path) -> ValueError:
    return ValueError(
        f"out={str(out)!r} is in use: another run is writing there; wait for its end, or choose another --out"
    )
