# SPDX-License-Identifier: Apache-2.0
"""``metrics.jsonl``: one line a step, written as the run goes, so that a run that ends early leaves its figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hyperep.exchange.load import LoadFigures
from hyperep.train.durable import write_durably
from hyperep.train.trainer import StepResult

__all__ = ["FILE_NAME", "MetricsWriter", "imbalance", "rank_imbalance", "read_metrics", "record_of"]

FILE_NAME = "metrics.jsonl"

Record = dict[str, Any]


def record_of(
    run: str, step: int, result: StepResult, tokens_per_second: float, figures: Sequence[LoadFigures]
) -> Record:
    """What is written about a step of the run of that id.

    ``expert_load`` is the rows that each expert got, over all ranks and summed over layers; ``layer_load`` is the same
    for each layer, and ``load`` the figures of :class:`hyperep.exchange.load.LoadFigures` for each layer.
    """
    return {
        "run": run,
        "step": step,
        "loss": result.loss,
        "tokens_per_s": round(tokens_per_second, 1),
        "expert_load": result.expert_load.sum(axis=0).tolist(),
        "layer_load": result.expert_load.tolist(),
        "load": [layer.as_dict() for layer in figures],
        "gradient_norm": result.gradient_norm,
    }


def imbalance(record: Record) -> float:
    """The load of the busiest expert of a layer over the layer's mean, in the worst layer; 1 is perfect balance."""
    return max(max(load) * len(load) / sum(load) for load in record["layer_load"])


def rank_imbalance(record: Record) -> float | None:
    """The same of the busiest rank; ``None`` in a record of a version that did not write it."""
    return max((layer["rank_max_over_mean"] for layer in record.get("load", ())), default=None)


class MetricsWriter:
    """Writes records to ``metrics.jsonl``, each one whole and at once.

    Args:
        directory: of the run.
        earlier: records of the run that this one goes on from; they are what the file holds before it is opened. At
            no moment does it hold fewer of them.
    """

    def __init__(self, directory: Path, earlier: Iterable[Record] = ()) -> None:
        path = directory / FILE_NAME
        content = b"".join(map(_line, earlier))
        write_durably(path, lambda partial: partial.write_bytes(content))
        self._file = path.open("ab")

    def write(self, record: Record) -> None:
        """Append a line."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk, as they must be before a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be written any more."""
        self._file.close()


def read_metrics(directory: Path, *, last_step: int, run: str | None = None) -> list[Record]:
    """The records of a run up to and including *last_step*; none if the run left no file.

    Raises:
        ValueError: a line is not what this program writes, or with *run* that of another run.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return []
    # What stands behind the last line's end was cut off by a kill; it belongs to a step after the last checkpoint.
    *lines, _ = path.read_bytes().split(b"\n")
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    for record in records:
        if run is not None and record.get("run") != run:
            raise ValueError(
                f"{path} holds lines of run {record.get('run', 'unknown')!r}, but the checkpoint is of run {run!r}; "
                f"move the file away, or go on from that run's own checkpoint"
            )
    return [record for record in records if record["step"] <= last_step]


def _line(record: Record) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _record(path: Path, number: int, line: bytes) -> Record:
    try:
        record: Record = json.loads(line)
        if type(record["step"]) is int:
            return record
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path}, line {number}, is no record of a step: {line[:40]!r}; mend it or move the file away")
