# SPDX-License-Identifier: Apache-2.0
"""Which of the two calls a module of experts takes; it says so itself, by an attribute ``takes``.

=============== ============================================ =======================================================
``takes``       called as                                    returns
=============== ============================================ =======================================================
``"rows"``      ``experts(rows, tokens_per_expert)``         one row for each row; rows are sorted by expert
``"tokens"``    ``experts(tokens, indices, weights)``        one row for each token, its experts weighted and added up
=============== ============================================ =======================================================

A module may take both, as ``hyperep.moe.GroupedExperts`` does: ``takes = ("tokens", "rows")``. Without the attribute it
takes rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hyperep.exchange.routed import RoutedExperts, RowExperts, routed_from_rows, rows_from_routed
from hyperep.platform.protocol import Module, Platform

__all__ = ["ROWS", "TOKENS", "LocalExperts", "declared_calls", "require_call"]

ROWS, TOKENS = "rows", "tokens"
_CALLS = {ROWS: "experts(rows, tokens_per_expert)", TOKENS: "experts(tokens, indices, weights)"}
_INPUTS = {ROWS: 2, TOKENS: 3}


def declared_calls(style: str, module: Module) -> tuple[str, ...]:
    """The calls that *module* takes.

    Raises:
        ValueError: it declares something else.
    """
    declared = getattr(module, "takes", ROWS)
    calls = (declared,) if isinstance(declared, str) else tuple(declared)
    if not calls or not set(calls) <= set(_CALLS):
        raise ValueError(f"{style}: the module declares takes={declared!r}; {_both_kinds()}")
    return calls


def require_call(style: str, calls: tuple[str, ...], inputs: tuple[Any, ...]) -> str:
    """Which of the declared *calls* a call with these positional *inputs* is.

    Raises:
        TypeError: none of them.
    """
    for call in calls:
        if len(inputs) == _INPUTS[call]:
            return call
    raise TypeError(
        f"{style} wraps a module that is called as {' or '.join(_CALLS[call] for call in calls)}, but it was called "
        f"with {len(inputs)} positional inputs; apply the style to the experts, not to the layer around them. "
        f"{_both_kinds().capitalize()}"
    )


@dataclass(frozen=True)
class LocalExperts:
    """What is inside a style: the experts of this rank, whichever call their module takes."""

    platform: Platform[Any]
    call: Callable[..., Any]
    takes: tuple[str, ...]
    num_experts: int
    """How many they are here."""

    @property
    def rows(self) -> RowExperts:
        """As row experts."""
        return self._returning_one if ROWS in self.takes else rows_from_routed(self.platform, self.routed)

    @property
    def routed(self) -> RoutedExperts:
        """As routed experts. A module that takes both gets rows, because here their number is often known."""
        if ROWS in self.takes:
            return routed_from_rows(self.platform, self._returning_one, self.num_experts)
        return lambda tokens, indices, weights, *, rows=None: self._returning_one(tokens, indices, weights)

    def _returning_one(self, *inputs: Any) -> Any:
        """The call, whose result is what travels back."""
        out = self.call(*inputs)
        if not self.platform.is_tensor(out):
            raise TypeError(
                f"the experts returned a {type(out).__module__}.{type(out).__qualname__}, but what travels back is one "
                f"tensor of platform {self.platform.name!r}, with a row for each row or token; return it alone, and "
                "keep what else they compute in a buffer"
            )
        return out

    def borrowing(self, module: Module) -> Callable[[Mapping[str, Any], int], RoutedExperts]:
        """From weights that are not *module*'s own, by path, and how many experts these are, to routed experts."""

        def borrowed(parameters: Mapping[str, Any], num_experts: int) -> RoutedExperts:
            call = functools.partial(self.platform.functional_call, module, parameters, self.call)
            return dataclasses.replace(self, call=call, num_experts=num_experts).routed

        return borrowed


def _both_kinds() -> str:
    return (
        f"there are two kinds of experts: takes = {ROWS!r}, called as {_CALLS[ROWS]}, which is what a module without "
        f"the attribute takes, and takes = {TOKENS!r}, called as {_CALLS[TOKENS]}"
    )
