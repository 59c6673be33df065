# SPDX-License-Identifier: Apache-2.0
"""In how many chunks tokens should travel, from what ``hyperep bench --calibrate`` measured on this machine.

A layer takes the time ``W`` of its wire and ``A`` of its arithmetic. In ``C`` chunks a part ``h`` of the smaller one is
hidden behind the larger one, all but the first chunk's, and each chunk more costs ``c``::

    time(C) = W + A - h * min(W, A) * (1 - 1 / C) + c * (C - 1)

Where ranks share the cores that also serve the wire, as on one machine, ``h`` is about zero: nothing is hidden. All
numbers that a choice is made of are the same on every rank, and so is the choice.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CHUNKS", "VARIABLE", "Calibration", "Load", "choose_chunks", "default_path", "fitting", "read", "write"]

CHUNKS = (1, 2, 4, 8)
"""What there is to choose from; each divides the last one, whose chunks are joined to fewer."""
VARIABLE = "HYPEREP_CALIBRATION"
"""Environment variable with the path of the file."""
_WORTH = 0.95
"""Chunks must promise at least this part of the time without."""
_LOG = logging.getLogger("hyperep.exchange")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one platform does on one device with so many ranks."""

    platform: str
    device: str
    ranks: int
    bytes_per_ms: float
    """That leave a rank in exchanges which are waited for one after the other."""
    flops_per_ms: float
    """Of a rank in the experts' products, with all that belongs to them."""
    hidden: float
    """``h``, from 0 to 1."""
    chunk_ms: float
    """``c``, for a layer of the size that was measured."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one call of a layer is, on the rank with the most tokens."""

    tokens: int
    top_k: int
    token_bytes: int
    expert_numbers: int
    """How many numbers the weights of one expert are."""

    def wire_bytes(self, ranks: int) -> float:
        """Bytes that leave the rank in forward and backward, if tokens choose evenly."""
        copies = (ranks - 1) * (1 - (1 - 1 / ranks) ** self.top_k)
        return self.tokens * copies * (4 * self.token_bytes + 12 * self.top_k)

    @property
    def flops(self) -> float:
        """Of the experts, forward and backward."""
        return 6.0 * self.tokens * self.top_k * self.expert_numbers


def choose_chunks(calibration: Calibration | None, load: Load) -> tuple[int, str]:
    """How many of :data:`CHUNKS`, never more than tokens, and why."""
    if calibration is None:
        return 1, "1 chunk: nothing was measured here; run hyperep bench --calibrate with these ranks"
    wire, arithmetic = (
        load.wire_bytes(calibration.ranks) / calibration.bytes_per_ms,
        load.flops / calibration.flops_per_ms,
    )
    waiting = wire + arithmetic
    times = {
        chunks: waiting
        - calibration.hidden * min(wire, arithmetic) * (1 - 1 / chunks)
        + calibration.chunk_ms * (chunks - 1)
        for chunks in CHUNKS
        if chunks <= max(load.tokens, 1)
    }
    best = min(times, key=lambda chunks: times[chunks])
    told = f"{load.tokens} tokens: wire {wire:.3g} ms, arithmetic {arithmetic:.3g} ms"
    if best == 1 or times[best] > _WORTH * waiting:
        return 1, f"1 chunk for {told}, of which too little would be hidden"
    return best, f"{best} chunks for {told}, {times[best]:.3g} ms instead of {waiting:.3g}"


def tell(chunks: int, reason: str) -> None:
    """Log a choice, as information the first time that this number is chosen."""
    _LOG.log(logging.DEBUG if chunks in _told else logging.INFO, "%s", reason)
    _told.add(chunks)


_told: set[int] = set()


def fitting(calibrations: Iterable[Calibration], platform: str, device: str, ranks: int) -> Calibration | None:
    """The one for these; the number of a device does not matter."""
    kind = device.partition(":")[0]
    for calibration in calibrations:
        if (calibration.platform, calibration.device, calibration.ranks) == (platform, kind, ranks):
            return calibration
    return None


def default_path() -> Path:
    """Where calibrations are kept: ``$HYPEREP_CALIBRATION``, or a file in the user's cache."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hyperep" / "calibration.json"


def read(path: Path | None = None) -> tuple[Calibration, ...]:
    """All calibrations of a file; none if it is not there.

    Raises:
        ValueError: it holds something else.
    """
    path = default_path() if path is None else path
    try:
        text = path.read_text()
    except FileNotFoundError:
        return ()
    try:
        return tuple(Calibration(**entry) for entry in json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no calibrations ({error}); delete it, and run hyperep bench --calibrate again"
        ) from error


def write(calibrations: Sequence[Calibration], path: Path | None = None) -> Path:
    """Keep *calibrations*, in place of those for the same platform, device and ranks; the path."""
    path = default_path() if path is None else path
    kept = {_key(of): of for of in (*read(path), *calibrations)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps([dataclasses.asdict(of) for of in kept.values()], indent=2) + "\n")
    beside.replace(path)  # whoever reads it now finds the old one or the new one
    return path


def _key(calibration: Calibration) -> tuple[Any, ...]:
    return calibration.platform, calibration.device, calibration.ranks
