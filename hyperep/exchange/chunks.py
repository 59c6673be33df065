# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens in parts, so that one part travels while another is computed, forward and backward.

To autodiff the whole layer is one function with a backward of its own: only so is the order of exchanges that of
:mod:`hyperep.exchange.schedule` on every rank, and not what a framework's engine makes of the graph. Inside, each part
is differentiated by ``vjp``, and its pullback is kept for backward::

    forward, of a part                                backward, of a part, the last one first
      send      tokens, numbers and weights             send      cotangents of the sums
      compute   experts, as a function of tokens,       compute   the pullback: gradients of what it was
                weights and parameters                            a function of
      return    sums                                    return    those of tokens and of weights; parameters'
                                                                  are added up meanwhile
      collect   add up each token's sums                collect   add up those of each token
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperep.exchange.calibration import CHUNKS, Calibration, Load, choose_chunks, fitting, tell
from hyperep.exchange.copies import own_choices
from hyperep.exchange.faults import dtype_bytes
from hyperep.exchange.routed import RoutedExperts, added_to
from hyperep.exchange.schedule import Steps, follow, schedule
from hyperep.exchange.tokens import (
    TokenDispatchContext,
    add_up,
    combine_tokens,
    dispatch_planned,
    from_owners,
    join_choices,
    plan_dispatch,
    require_one_each,
    split_choices,
    to_owners,
)
from hyperep.mesh import DeviceMesh
from hyperep.platform.protocol import Module, Parameter

__all__ = ["Auto", "OverRanksInChunks"]

_MEANWHILE = -1
"""Where the pullback of what is computed meanwhile is kept, beside those of the parts."""


@dataclass(frozen=True)
class Auto:
    """As many parts as pay, by what was measured."""

    calibrations: tuple[Calibration, ...]

    def choose(
        self, of: OverRanksInChunks, tokens: Any, indices: Any, parameters: Sequence[Parameter], most: int
    ) -> int:
        """How many parts for a call in which a rank has at *most* so many tokens; the same on all ranks."""
        platform, ranks = of.mesh.platform, of.mesh.size()
        numbers = sum(math.prod(platform.local(parameter).shape) for parameter in parameters)
        load = Load(
            tokens=most,
            top_k=indices.shape[1],
            token_bytes=tokens.shape[1] * dtype_bytes(tokens.dtype),
            expert_numbers=numbers * ranks // of.num_experts,
        )
        chunks, reason = choose_chunks(fitting(self.calibrations, platform.name, platform.device, ranks), load)
        tell(chunks, reason)
        return chunks


@dataclass(frozen=True)
class OverRanksInChunks:
    """What :func:`hyperep.exchange.routed.over_ranks` makes, with the tokens of a call in parts.

    Results are the same to rounding: parameters' gradients are sums over the parts. The parts' counts travel in one
    message, and are copied to the host once. At most two parts are on their way at a time. Its backward can be run
    once: what a part has kept is freed as soon as it has been used.
    """

    experts: RoutedExperts
    """Of this rank."""
    mesh: DeviceMesh
    """1-D."""
    num_experts: int
    """Of all ranks."""
    chunks: int | Auto
    """How many parts, the same on all ranks. Some may have no tokens."""
    module: Module
    """Whose parameters *experts* read, and nothing else that has a gradient."""

    def __call__(
        self, tokens: Any, indices: Any, weights: Any, *, rows: int | None = None, meanwhile: Module | None = None
    ) -> Any:
        """What the experts make of the tokens; with *meanwhile*, a module, what it makes of them is added.

        It is computed while the first part is on its way, and its backward while the first cotangents are.
        """
        platform = self.mesh.platform
        own, beside = ([] if of is None else list(platform.parameters(of).values()) for of in (self.module, meanwhile))
        parts: dict[str, Any]
        if self.mesh.size() == 1:  # nothing travels
            parts = {}
        elif isinstance(self.chunks, Auto):
            auto = functools.partial(self.chunks.choose, self, tokens, indices, own)
            parts = {"parts": CHUNKS[-1], "choose": auto}
        else:
            parts = {"parts": self.chunks}
        plans = plan_dispatch(tokens, indices, weights, self.mesh, num_experts=self.num_experts, **parts)
        if len(plans) == 1:
            arrived = dispatch_planned(tokens, indices, weights, plans[0])
            out = combine_tokens(self.experts(*arrived, rows=plans[0].rows), plans[0])
            return added_to(out, meanwhile, tokens)
        call = _Call(self, plans, join_choices(platform, indices, weights), meanwhile, own, beside)
        inputs = (tokens, weights, *map(platform.local, own), *map(platform.local, beside))
        return platform.custom_vjp(call.forward, call.backward)(*inputs)


@dataclass(frozen=True)
class _Call:
    """One call: its forward, its backward, and what the one leaves for the other."""

    of: OverRanksInChunks
    plans: list[TokenDispatchContext]
    choices: Any
    meanwhile: Module | None
    parameters: list[Parameter]
    """Of the experts."""
    parameters_beside: list[Parameter]
    """Of what is computed meanwhile."""
    pullbacks: dict[int, Callable[..., tuple[Any, ...]]] = field(default_factory=dict)
    """By part."""

    def forward(self, tokens: Any, weights: Any, *parameters: Any) -> tuple[Any, tuple[Any, ...]]:
        """Output, and residuals of custom_vjp."""
        platform, plans, dtype = self.of.mesh.platform, self.plans, weights.dtype
        sums: dict[int, Any] = {}

        def send(part: int) -> Any:
            plan = plans[part]
            return [to_owners(x[plan.part], plan, async_op=True) for x in (self.choices, tokens)]

        def compute(part: int, arrived: Any) -> Any:
            plan = plans[part]
            numbers, weights = split_choices(platform, arrived[0], dtype)
            numbers = own_choices(platform, numbers, plan.first, plan.owned)

            def experts(tokens: Any, weights: Any) -> Any:
                return self.of.experts(tokens, numbers, weights, rows=plan.rows)

            out, self.pullbacks[part] = platform.vjp(experts, arrived[1], weights, parameters=self.parameters)
            require_one_each(out, plan)
            return out

        def collect(part: int, work: Any) -> None:
            sums[part] = add_up(work.wait(), plans[part])

        def meanwhile() -> None:
            if self.meanwhile is not None:
                sums[_MEANWHILE], self.pullbacks[_MEANWHILE] = platform.vjp(
                    self.meanwhile, tokens, parameters=self.parameters_beside
                )

        steps = Steps(
            send=send,
            receive=lambda part, works: [work.wait() for work in works],
            compute=compute,
            give_back=lambda part, out: from_owners(out, plans[part], async_op=True),
            collect=collect,
            meanwhile=meanwhile,
        )
        follow(schedule(len(plans)), steps)
        out = platform.xp.concat([sums[part] for part in range(len(plans))], axis=0)
        # Recompute ends where the last tensor is saved again, and must not end between exchanges: so one is saved here.
        return (out + sums[_MEANWHILE] if self.meanwhile is not None else out), (weights,)

    def backward(
        self, residuals: tuple[Any, ...], cotangents: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> tuple[Any, ...]:
        """Gradients of tokens, weights and parameters."""
        platform, plans, cotangent = self.of.mesh.platform, self.plans[::-1], cotangents[0]
        xp, dtype, last = platform.xp, residuals[0].dtype, len(self.plans) - 1
        found: dict[int, tuple[Any, Any]] = {}
        own: list[Any] = []  # gradients of parameters: of the parts before, then of all
        fresh: list[Any] = []  # of this part
        beside: list[Any] = []

        def send(part: int) -> Any:
            return to_owners(cotangent[plans[part].part], plans[part], async_op=True)

        def compute(part: int, arrived: Any) -> Any:
            tokens, weights, *fresh[:] = self._pull(last - part)(arrived)
            return xp.astype(weights, self.choices.dtype), tokens

        def give_back(part: int, gradients: Any) -> Any:
            works = [from_owners(g, plans[part], async_op=True) for g in gradients]
            # Added while they are on their way, the last ones while nothing else is left to do. A pullback may give
            # views of what is not ours; the first sum is ours, and the next ones are added in place.
            if part:
                _add_up(own, fresh, operator.add if part == 1 else operator.iadd)
            else:
                own[:], fresh[:] = fresh, []
            return works

        def collect(part: int, works: Any) -> None:
            weights, tokens = (add_up(work.wait(), plans[part]) for work in works)
            found[part] = tokens, xp.astype(weights, dtype)

        def meanwhile() -> None:
            if self.meanwhile is not None:
                found[_MEANWHILE], *beside[:] = self._pull(_MEANWHILE)(cotangent)

        steps = Steps(
            send=send,
            receive=lambda part, work: work.wait(),
            compute=compute,
            give_back=give_back,
            collect=collect,
            meanwhile=meanwhile,
        )
        follow(schedule(len(plans)), steps)
        tokens, weights = (xp.concat([found[last - part][i] for part in range(last + 1)], axis=0) for i in (0, 1))
        if self.meanwhile is not None:
            tokens = tokens + found[_MEANWHILE]
        return tokens, weights, *own, *beside

    def _pull(self, part: int) -> Callable[..., tuple[Any, ...]]:
        if part not in self.pullbacks:
            raise RuntimeError(
                "backward ran twice through a layer of experts in chunks, which frees what it has used; run forward "
                "again, or apply the style with chunks=1"
            )
        return self.pullbacks.pop(part)


def _add_up(sums: list[Any], terms: list[Any], add: Callable[[Any, Any], Any]) -> None:
    """Add its term to each of *sums*, one after the other: one new sum is there beside what was, and not all."""
    for i, term in enumerate(terms):
        sums[i] = add(sums[i], term)
    terms.clear()
