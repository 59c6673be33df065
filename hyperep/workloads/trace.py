# SPDX-License-Identifier: Apache-2.0
"""``Trace``: which experts the tokens of a training run went to, and the plain file that keeps it.

The file is NumPy's ``.npz``, with the arrays ``choices`` ``[steps, layers, tokens, K]``, in the smallest unsigned
integers that hold them, ``experts``, a number, and ``first_step``. Tokens are in the order of the batch over all ranks,
so that the trace does not depend on how many ranks made it.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

__all__ = ["Trace", "read_trace", "recorded", "write_trace"]

_RECORDED = Path(__file__).parent / "recorded"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """A recorded routing."""

    choices: np.ndarray
    """Unsigned integers ``[steps, layers, tokens, K]``."""
    experts: int
    """``E``; all choices are below it."""
    first_step: int = 1
    """The number that the run gave to the first of the steps."""

    def __post_init__(self) -> None:
        """Check that the arrays are what they are said to be.

        Raises:
            ValueError: they are not.
        """
        found = self.choices
        if found.ndim != 4 or not found.size or found.dtype.kind != "u":
            raise ValueError(
                f"choices of a trace are unsigned integers [steps, layers, tokens, K], and some; these are "
                f"{found.dtype} {list(found.shape)}"
            )
        if int(found.max()) >= self.experts:
            raise ValueError(f"the trace names expert {found.max()}, but has experts={self.experts}")

    @property
    def counts(self) -> np.ndarray:
        """How often each expert was chosen, int64 ``[steps, layers, E]``."""
        steps, layers, *_ = self.choices.shape
        found = np.zeros((steps, layers, self.experts), dtype=np.int64)
        for step, layer in np.ndindex(steps, layers):
            found[step, layer] = np.bincount(self.choices[step, layer].ravel(), minlength=self.experts)
        return found

    def part(
        self, rank: int, ranks: int, tokens: int, *, experts: int, top_k: int, seed: int = 0, step: int = 0
    ) -> np.ndarray:
        """The choices of *tokens* tokens of *rank*, int64 ``[T, K]``: its part of a recorded step.

        Tokens, steps and layers are counted in a circle; *seed* is the layer.

        Raises:
            ValueError: the trace has another number of experts or of choices, or fewer tokens than there are ranks.
        """
        steps, layers, count, recorded_k = self.choices.shape
        if (experts, top_k) != (self.experts, recorded_k):
            raise ValueError(
                f"the trace is of {self.experts} experts and top-{recorded_k}, not of {experts} and top-{top_k}; "
                f"record another one: hyperep train --record-trace --experts {experts} --top-k {top_k}"
            )
        if count < ranks:
            raise ValueError(f"the trace has {count} tokens a step, which are too few for {ranks} ranks")
        own = self.choices[step % steps, seed % layers, rank * count // ranks : (rank + 1) * count // ranks]
        return own[np.arange(tokens) % len(own)].astype(np.int64)


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write the file of *trace*.

    Raises:
        OSError: it cannot be written.
    """
    narrow = trace.choices.astype(np.min_scalar_type(trace.experts - 1))
    with Path(path).open("wb") as file:  # given a name, NumPy would add to it
        np.savez_compressed(file, choices=narrow, experts=trace.experts, first_step=trace.first_step)


def read_trace(path: str | Path) -> Trace:
    """Read the file of a trace.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is no trace.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return Trace(choices=file["choices"], experts=int(file["experts"]), first_step=int(file["first_step"]))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no trace of hyperep train --record-trace: {error}") from error


@cache
def recorded(experts: int, top_k: int) -> Trace:
    """The trace that comes with hyperep for these sizes.

    Raises:
        ValueError: none does.
    """
    path = _RECORDED / f"{experts}-{top_k}.npz"
    if not path.exists():
        there = " and ".join(sorted(p.stem.replace("-", " experts with top-") for p in _RECORDED.glob("*.npz")))
        raise ValueError(
            f"no trace comes with hyperep for {experts} experts and top-{top_k}, only for {there}; record one: "
            f"hyperep train --record-trace --experts {experts} --top-k {top_k}"
        )
    return read_trace(path)
