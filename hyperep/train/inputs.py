# SPDX-License-Identifier: Apache-2.0
"""What a run begins from: its text, and the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperep.train.checkpoint import Manifest, read_manifest
from hyperep.train.metrics import read_metrics
from hyperep.train.recorder import earlier_trace
from hyperep.train.settings import Settings
from hyperep.train.text import Text, load_text
from hyperep.workloads import Trace

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a run reads, but for a checkpoint's tensors."""

    text: Text
    resume: Manifest | None
    """The checkpoint that it goes on from."""
    earlier: tuple[dict[str, Any], ...]
    """The records of the steps before."""
    trace: Trace | None
    """The recorded choices of the steps before, where they can be continued."""


def read_inputs(settings: Settings) -> Inputs:
    """Read what *settings* name.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the text is too short, or not the one that the checkpoint was trained on; the checkpoint, or the
            metrics or the trace beside it, cannot be used.
    """
    text = load_text(settings.text, at_least=settings.seq_len + 1)
    resume = read_manifest(settings.resume) if settings.resume else None
    if resume is None:
        return Inputs(text=text, resume=None, earlier=(), trace=None)
    if resume.text != text.digest:
        raise ValueError(
            f"text {text.name!r} is not the one that the checkpoint in {resume.directory} was trained on: its SHA-256 "
            f"is {text.digest[:16]}, and that one's {resume.text[:16]}; give that text with --text, or begin a new run"
        )
    earlier = read_metrics(resume.home, last_step=resume.step, run=resume.run) if resume.home else []
    trace = None
    if resume.home and settings.record_trace:
        trace = earlier_trace(resume.home, last_step=resume.step, tokens=settings.batch_tokens)
    return Inputs(text=text, resume=resume, earlier=tuple(earlier), trace=trace)
