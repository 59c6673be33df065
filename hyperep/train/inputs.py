# SPDX-License-Identifier: Apache-2.0
"""What a run begins from: its text, and the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.train.checkpoint import Manifest, read_manifest
from hyperep.train.metrics import read_metrics
from hyperep.train.settings import Settings
from hyperep.train.text import Text, load_text

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads, but for a checkpoint's tensors."""

    text: Text
    resume: Manifest | None
    """The checkpoint that it goes on from."""
    earlier: tuple[dict[str, Any], ...]
    """The records of the steps before."""


def read_inputs(settings: Settings) -> Inputs:
    """Read what *settings* name.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the text is too short, or not the one that the checkpoint was trained on; the checkpoint, or the
            metrics beside it, cannot be used.
    """
    text = load_text(settings.text, at_least=settings.seq_len + 1)
    resume = read_manifest(settings.resume) if settings.resume else None
    if resume is None:
        return Inputs(text=text, resume=None, earlier=())
    if resume.text != text.digest:
        raise ValueError(
            f"text {text.name!r} is not the one that the checkpoint in {resume.directory} was trained on: its SHA-256 "
            f"is {text.digest[:16]}, and that one's {resume.text[:16]}; give that text with --text, or begin a new run"
        )
    earlier = read_metrics(resume.home, last_step=resume.step, run=resume.run) if resume.home else []
    return Inputs(text=text, resume=resume, earlier=tuple(earlier))
