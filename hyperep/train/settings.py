# SPDX-License-Identifier: Apache-2.0
"""``Settings``: everything that determines a run, as plain data that travels to every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["DTYPES", "MODEL_FIELDS", "STYLES", "VOCABULARY", "Settings"]

VOCABULARY = 256
"""Tokens are bytes."""
DTYPES = ("auto", "float32", "float64")
STYLES = ("ep", "tp", "etp")
"""Experts split over ranks; every expert sliced over ranks; both."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings. The number of ranks and the platform are not among them: they must not change the result."""

    steps: int = 200
    experts: int = 8
    top_k: int = 2
    dim: int = 96
    layers: int = 2
    heads: int = 4
    seq_len: int = 128
    batch_tokens: int = 2048
    """Tokens of one step, over all ranks."""
    lr: float = 3e-3
    warmup_steps: int = 10
    weight_decay: float = 0.01
    balance: float = 0.03
    """Weight of the load-balancing loss; the reported loss is without it."""
    clip_norm: float = 1.0
    dtype: str = "auto"
    """Of weights and arithmetic: ``auto`` is float64 where the platform has it; see :mod:`hyperep.train.precision`."""
    seed: int = 0
    text: str | None = None
    """A file or a directory; ``None`` is the source of the Python standard library."""
    style: str = "ep"
    tp: int = 1
    """Ranks that slice one expert; with style ``ep`` always 1."""
    balance_experts: int = 0
    """Experts of others that a rank computes for a step where they are hot; 0: none."""
    chunks: int = 1
    """Parts in which tokens travel, so that one is computed while another does."""
    verify: bool = False
    record_trace: bool = False
    """Whether the run leaves the choices of all its tokens, as a trace that :mod:`hyperep.workloads` reads."""
    save_every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    out: str = "run"
    overwrite: bool = False
    """Whether another run in ``out`` is replaced; else it is an error."""
    resume: str | None = None
    """A directory that an earlier run wrote."""

    @property
    def hidden(self) -> int:
        """Hidden size of each expert."""
        return 2 * self.dim

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.batch_tokens // self.seq_len

    def check(self, ranks: int) -> Settings:
        """Return the settings themselves, if a world of *ranks* ranks can run them.

        Raises:
            ValueError: naming the value, the rule and the way out.
        """
        for name in ("steps", "experts", "top_k", "dim", "layers", "heads", "seq_len", "batch_tokens", "tp"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "weight_decay", "balance", "save_every", "seed"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("lr", "clip_norm", "weight_decay", "balance"):
            _require(math.isfinite(getattr(self, name)), f"{name}={getattr(self, name)} must be a finite number")
        for name in ("lr", "clip_norm"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above zero")
        _require(self.top_k <= self.experts, f"top_k={self.top_k} must not be above experts={self.experts}")
        _require(
            self.dim % (2 * self.heads) == 0,
            f"dim={self.dim} is not divisible by twice the heads, 2 x {self.heads}: the size of a head must be even; "
            f"choose a multiple of {2 * self.heads}, or other heads",
        )
        _require(
            self.batch_tokens % self.seq_len == 0,
            f"batch_tokens={self.batch_tokens} is not divisible by seq_len={self.seq_len}; choose a multiple of it, "
            f"for example {max(self.sequences, 1) * self.seq_len}",
        )
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        self._check_style(ranks)
        return self

    def _check_style(self, ranks: int) -> None:
        _require(self.style in STYLES, f"style={self.style!r} is none of {', '.join(STYLES)}")
        _require(
            self.style != "ep" or self.tp == 1,
            f"tp={self.tp} with style 'ep', which slices no expert; choose etp or tp",
        )
        _require(self.balance_experts >= 0, f"balance_experts={self.balance_experts} must not be negative")
        _require(self.chunks >= 1, f"chunks={self.chunks} must be at least 1")
        _require(
            self.style != "tp" or (self.balance_experts == 0 and self.chunks == 1),
            f"balance_experts={self.balance_experts} and chunks={self.chunks} with style 'tp', in which no token "
            "travels; choose ep or etp",
        )
        _require(
            self.balance_experts == 0 or self.chunks == 1,
            f"balance_experts={self.balance_experts} with chunks={self.chunks}: experts that are copied come with the "
            "tokens, and not before the first chunk; choose one of them",
        )
        _require(ranks % self.tp == 0, f"tp={self.tp} does not divide the {ranks} ranks; choose a divisor of {ranks}")
        groups = ranks // self.tp
        if self.style != "tp":
            _require(
                self.experts % groups == 0,
                f"experts={self.experts} is not divisible by the {groups} ranks that they are split over; choose a "
                f"multiple of {groups} experts, or a number of ranks that divides {self.experts}",
            )
        _require(
            self.sequences % groups == 0,
            f"batch_tokens={self.batch_tokens} is not divisible by {groups} ranks x seq_len={self.seq_len}; choose a "
            f"multiple of {groups * self.seq_len}",
        )
        if self.style != "ep":
            _require(
                self.hidden % self.tp == 0,
                f"an expert's hidden size, 2 x dim={self.hidden}, is not divisible by tp={self.tp}; choose another dim",
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as what ``json`` can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from what :meth:`as_dict` returned.

        Raises:
            ValueError: a name is unknown to this version, or a value is of another type than it has here.
        """
        types = {field.name: str(field.type) for field in fields(cls)}
        unknown = set(values) - set(types)
        _require(not unknown, f"unknown settings {sorted(unknown)}; known are {list(types)}")
        for name, value in values.items():
            _require(type(value) in _TYPES[types[name]], f"{name}={value!r} must be of type {types[name]}")
        return cls(**values)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "str | None": (str, type(None)),
}
"""What a field of each type may hold. A ``bool`` is no ``int`` here."""

MODEL_FIELDS = ("experts", "top_k", "dim", "layers", "heads")
"""What makes the model's function: a run that goes on from a checkpoint must not change it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
