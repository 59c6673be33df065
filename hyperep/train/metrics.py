# SPDX-License-Identifier: Apache-2.0
"""``metrics.jsonl``: one line a step, written as the run goes, so that a run that ends early leaves its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hyperep.train.trainer import StepResult

__all__ = ["FILE_NAME", "MetricsWriter", "imbalance", "read_metrics", "record_of"]

FILE_NAME = "metrics.jsonl"

Record = dict[str, Any]


def record_of(step: int, result: StepResult, tokens_per_second: float) -> Record:
    """What is written about a step.

    ``expert_load`` is the rows that each expert got, over all ranks and summed over layers; ``layer_load`` is the same
    for each layer.
    """
    return {
        "step": step,
        "loss": result.loss,
        "tokens_per_s": round(tokens_per_second, 1),
        "expert_load": result.expert_load.sum(axis=0).tolist(),
        "layer_load": result.expert_load.tolist(),
        "gradient_norm": result.gradient_norm,
    }


def imbalance(record: Record) -> float:
    """The load of the busiest expert of a layer over the layer's mean, in the worst layer; 1 is perfect balance."""
    return max(max(load) * len(load) / sum(load) for load in record["layer_load"])


class MetricsWriter:
    """Writes records to a new ``metrics.jsonl``, each one whole and at once.

    Args:
        directory: of the run.
        earlier: records of the run that this one goes on from; they come first.
    """

    def __init__(self, directory: Path, earlier: Iterable[Record] = ()) -> None:
        self._file = (directory / FILE_NAME).open("w", encoding="utf-8")
        for record in earlier:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append a line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing can be written any more."""
        self._file.close()


def read_metrics(directory: Path, *, last_step: int) -> list[Record]:
    """The records of a run up to and including *last_step*; none if the run left no file."""
    path = directory / FILE_NAME
    if not path.exists():
        return []
    # The last line of a run that was killed may be cut off; it belongs to a step after the last checkpoint.
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
    return [record for record in map(json.loads, lines) if record["step"] <= last_step]
