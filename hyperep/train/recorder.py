# SPDX-License-Identifier: Apache-2.0
"""``trace.npz``: the experts of all tokens of a run, as a workload for later."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hyperep.train.durable import write_durably
from hyperep.workloads import Trace, read_trace, write_trace

__all__ = ["FILE_NAME", "Recorder", "earlier_trace"]

FILE_NAME = "trace.npz"


class Recorder:
    """Gathers the choices of a run, and writes all of them at once.

    Args:
        directory: of the run.
        experts: ``E``.
        earlier: of the run that this one goes on from.
    """

    def __init__(self, directory: Path, experts: int, earlier: Trace | None) -> None:
        self._path, self._experts = directory / FILE_NAME, experts
        self._first_step = None if earlier is None else earlier.first_step
        self._steps: list[np.ndarray] = [] if earlier is None else list(earlier.choices)

    def add(self, step: int, choices: np.ndarray | None) -> None:
        """Those of the next step, unsigned integers ``[layers, tokens, K]``; nothing where none are recorded."""
        if choices is None:
            return
        self._first_step = step if self._first_step is None else self._first_step
        self._steps.append(choices)

    def write(self) -> None:
        """Replace the file by one of the steps so far, if there are any.

        Raises:
            OSError: it cannot be written.
        """
        if self._first_step is None:
            return
        trace = Trace(choices=np.stack(self._steps), experts=self._experts, first_step=self._first_step)
        write_durably(self._path, lambda partial: write_trace(partial, trace))


def earlier_trace(directory: Path, *, last_step: int, tokens: int) -> Trace | None:
    """The trace of a run up to *last_step*; ``None`` if it left none, or one that cannot be continued.

    That is one that does not reach so far, or with another number of *tokens* a step.

    Raises:
        ValueError: the file is no trace.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    trace = read_trace(path)
    steps = last_step - trace.first_step + 1
    if not 0 < steps <= len(trace.choices) or trace.choices.shape[2] != tokens:
        return None
    return Trace(choices=trace.choices[:steps], experts=trace.experts, first_step=trace.first_step)
