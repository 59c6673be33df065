# SPDX-License-Identifier: Apache-2.0
"""What the audit asks of somebody's layer: a ``Subject`` describes it, a ``Specimen`` is it, on one rank.

Users rarely write these by hand. ``hyperep_torch.audit.ModuleSubject`` makes them of an ``nn.Module``, and
:class:`hyperep.audit.platform_subject.PlatformSubject` of a module of any hyperep platform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from hyperep.audit.claims import Claims
from hyperep.audit.shown import Shown

__all__ = ["Call", "Mode", "NotOffered", "Part", "Specimen", "Subject", "part_of_rank"]

Mode = Literal["train", "evaluate", "recompute"]


class NotOffered(Exception):
    """The subject does not say how to do this; what needs it is left out, and the report says so."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's part of something."""

    value: np.ndarray | None
    """The numbers; ``None`` for a gradient that is absent."""
    start: tuple[int, ...]
    """Where the part begins in the whole, along each dim."""
    whole: tuple[int, ...]
    """Shape of the whole."""
    shape: tuple[int, ...]
    """Shape of the part, also where the value is absent."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A forward pass that was made."""

    output: np.ndarray
    """``[T, D]``."""
    tokens_after: np.ndarray
    """The tokens that the layer was given, read again afterwards."""
    handle: Any
    """What :meth:`Specimen.backward` needs."""


class Specimen(ABC):
    """The layer on this rank. Names and layouts are the layer's own; arrays are float32 or float64."""

    @abstractmethod
    def forward(self, tokens: np.ndarray, mode: Mode) -> Call:
        """Call the layer with this rank's tokens ``[T, D]``."""

    @abstractmethod
    def backward(self, handle: Any, cotangent: np.ndarray) -> np.ndarray | None:
        """Go back through one call, adding to the parameters' gradients; the gradient of its tokens."""

    @abstractmethod
    def finish(self) -> None:
        """Do what the user does between the last backward and the optimizer: reductions of gradients, for instance."""

    @abstractmethod
    def gradients(self) -> Mapping[str, Part | tuple[Part, ...]]:
        """What the optimizer would see on this rank."""

    @abstractmethod
    def zero(self) -> None:
        """Forget all gradients."""

    @abstractmethod
    def weights(self) -> Mapping[str, Part | tuple[Part, ...]]:
        """The weights as they are."""

    def gradient_norm(self) -> float:
        """The norm of all gradients as the user computes it."""
        raise NotOffered("no gradient norm")

    def optimizer(self) -> Mapping[str, Any]:
        """Name (``"adamw"`` or ``"sgd"``) and hyperparameters of the optimizer that :meth:`step` uses."""
        raise NotOffered("no optimizer")

    def step(self) -> None:
        """Let the optimizer do a step."""
        raise NotOffered("no optimizer")

    def save(self, folder: str) -> None:
        """Write weights and optimizer to *folder*, which all ranks see. Called on all of them."""
        raise NotOffered("no checkpoints")

    def load(self, folder: str) -> None:
        """Read what another specimen, perhaps on another number of ranks, has written."""
        raise NotOffered("no checkpoints")

    def freeze(self, kind: str) -> None:
        """Let parameters of a *kind* (see :meth:`Claims.kind`) have no gradient."""
        raise NotOffered("no frozen parameters")

    def kept_bytes(self) -> int:
        """Bytes of tensors that are alive in this process."""
        raise NotOffered("no measure of memory")


@runtime_checkable
class Subject(Protocol):
    """A layer to audit."""

    @property
    def name(self) -> str:
        """For people; empty for where the subject lies."""
        ...

    @property
    def platform(self) -> str:
        """Name of the hyperep platform whose ranks it runs on."""
        ...

    @property
    def claims(self) -> Claims:
        """What is right for it."""
        ...

    def build(self, platform: Any, weights: Mapping[str, np.ndarray] | None, seed: int) -> Specimen:
        """Make the layer on this rank; ``weights=None`` leaves its own initial ones, for which *seed* was set."""
        ...

    def canonical(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Whole arrays, by the layer's names and in its layout, to the names and shapes of :attr:`Claims.shapes`."""
        ...

    def script(self, shown: Shown) -> str:
        """A program that shows a finding without this package.

        Raises:
            NotOffered: the subject, or the finding, cannot be written down, and why.
        """
        ...


def part_of_rank(value: np.ndarray | None, shape: tuple[int, ...], whole: tuple[int, ...], rank: int) -> Part:
    """The part that this rank holds if it holds either all, or an equal share of dim 0 in the order of ranks.

    Raises:
        ValueError: *shape* is neither.
    """
    if shape == whole:
        return Part(value=value, start=(0,) * len(whole), whole=whole, shape=shape)
    if len(shape) != len(whole) or shape[1:] != whole[1:] or not shape[0] or whole[0] % shape[0]:
        raise ValueError(f"a part of shape {shape} is neither all of {whole} nor an equal share of its dim 0")
    shares = whole[0] // shape[0]
    return Part(value=value, start=(rank % shares * shape[0],) + (0,) * (len(whole) - 1), whole=whole, shape=shape)
