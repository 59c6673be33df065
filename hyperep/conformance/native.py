# SPDX-License-Identifier: Apache-2.0
"""``NativeTraining``: how a framework is trained by its own means, so that the suite can compare them with ``vjp``.

Users of a framework do not call ``Platform.vjp``. They call ``backward()`` or a function of gradients, hand parameters
to an optimizer, and save what a module holds. A platform that declares ``NATIVE_TRAINING`` has an attribute
``native_training`` of this protocol, which is no member of the platform protocol: nothing but the suite reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hyperep.platform.protocol import Module, Parameter

__all__ = ["NativeTraining"]


class NativeTraining(Protocol):
    """Three things that users do, in the framework's own words; tensors and modules are the framework's."""

    def backward(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        parameters: Sequence[Parameter],
        cotangent: Any,
    ) -> tuple[Any, Sequence[Any]]:
        """Evaluate ``function(*inputs)`` and differentiate it by the framework's own means, never by ``Platform.vjp``.

        Returns:
            The output; and the gradients of the inputs, then of this rank's parts of *parameters*, for *cotangent*.
            ``None`` where the framework has none.
        """
        ...

    def step(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        parameters: Sequence[Parameter],
        cotangent: Any,
        rate: float,
    ) -> None:
        """One step of plain gradient descent of *parameters* at *rate*: its own backward, its own optimizer."""
        ...

    def save(self, module: Module) -> Mapping[str, np.ndarray]:
        """What the framework saves of a module: this rank's parts, by dotted path."""
        ...

    def load(self, module: Module, saved: Mapping[str, np.ndarray]) -> None:
        """Put back what :meth:`save` gave, as the framework loads."""
        ...
