# SPDX-License-Identifier: Apache-2.0
"""``Between``: stands before a platform, and sees each of its exchanges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hyperep.platform.base import PlatformBase
from hyperep.platform.protocol import Group, Platform

__all__ = ["Between"]

Route = tuple[Sequence[int] | None, Sequence[int] | None, Group]
"""Output splits, input splits and the group of an exchange."""


class Between(ABC):
    """Has all members of *platform*; a subclass says what becomes of an exchange."""

    def __init__(self, platform: Platform[Any]) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    @abstractmethod
    def _exchange(self, x: Any, route: Route, async_op: bool) -> Any:
        """What ``all_to_all_single(x, *route, async_op)`` returns."""

    def all_to_all_single(
        self,
        x: Any,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group = None,
        async_op: bool = False,
    ) -> Any:
        """The platform's, seen."""
        return self._exchange(x, (output_splits, input_splits, group), async_op)

    def differentiable_all_to_all_single(
        self, x: Any, input_splits: Sequence[int], output_splits: Sequence[int], group: Group = None
    ) -> Any:
        """The two exchanges that the protocol prescribes, each of them seen."""
        return PlatformBase.differentiable_all_to_all_single(self, x, input_splits, output_splits, group)  # type: ignore[arg-type]
