# SPDX-License-Identifier: Apache-2.0
"""The eight workloads by name.

Letters: ``T`` tokens of a rank, ``E`` experts, ``K`` choices of a token, ``R`` ranks, ``L = E / R``. Rank ``r`` owns
the experts ``r * L`` to ``(r + 1) * L - 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hyperep.workloads import draws
from hyperep.workloads.trace import Trace, recorded

__all__ = ["NAMES", "WORKLOADS", "Call", "choices", "counts"]

BURST_EVERY = 4
"""Steps from one burst to the next; step 0 is one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a workload is asked for."""

    tokens: int
    experts: int
    top_k: int
    ranks: int
    rank: int
    seed: int
    step: int
    trace: Trace | None
    rng: np.random.Generator
    """This rank's own, at this seed and step."""

    @property
    def sizes(self) -> tuple[np.random.Generator, int, int, int]:
        """What every draw begins with."""
        return self.rng, self.tokens, self.experts, self.top_k


def uniform(call: Call) -> np.ndarray:
    """All experts are equally likely."""
    return draws.evenly(*call.sizes)


def zipf(call: Call) -> np.ndarray:
    """The n-th most popular expert is 1 / n as popular as the first; the seed says which one that is."""
    popularity = 1.0 / (1.0 + np.random.default_rng([call.seed, 1]).permutation(call.experts))
    return draws.by_popularity(call.rng, call.tokens, popularity, call.top_k)


def hot_expert(call: Call) -> np.ndarray:
    """Half of all choices are expert 0, the others even; a token may have it several times."""
    return draws.repeating(*call.sizes, hot=1, share=0.5)


def hot_rank(call: Call) -> np.ndarray:
    """Half of all choices are experts of rank 0, beside its even part of the others."""
    return draws.with_group(*call.sizes, group=np.arange(call.experts // call.ranks), share=0.5)


def drift(call: Call) -> np.ndarray:
    """Half of all choices fall on an eighth of the experts, beside their even part; it moves on by one each step."""
    spot = (call.step + np.arange(max(1, call.experts // 8))) % call.experts
    return draws.with_group(*call.sizes, group=spot, share=0.5)


def bursts(call: Call) -> np.ndarray:
    """Even; but in each fourth step, from 0 on, three quarters fall on a sixteenth of the experts, others each time."""
    if call.step % BURST_EVERY:
        return draws.evenly(*call.sizes)
    order = np.random.default_rng([call.seed, call.step, 2]).permutation(call.experts)
    return draws.with_group(*call.sizes, group=order[: max(1, call.experts // 16)], share=0.75)


def idle_rank(call: Call) -> np.ndarray:
    """Even, but the last rank has no tokens: ``[0, K]``. Where there is one rank alone, it has."""
    idle = call.ranks > 1 and call.rank == call.ranks - 1
    return draws.evenly(call.rng, 0 if idle else call.tokens, call.experts, call.top_k)


def trace(call: Call) -> np.ndarray:
    """What was recorded: the step, and its layer by the seed; a rank has its part of the tokens, over and over."""
    found = recorded(call.experts, call.top_k) if call.trace is None else call.trace
    return found.part(
        call.rank, call.ranks, call.tokens, experts=call.experts, top_k=call.top_k, seed=call.seed, step=call.step
    )


WORKLOADS: Mapping[str, Callable[[Call], np.ndarray]] = MappingProxyType(
    {
        "uniform": uniform,
        "zipf": zipf,
        "hot-expert": hot_expert,
        "hot-rank": hot_rank,
        "drift": drift,
        "bursts": bursts,
        "idle-rank": idle_rank,
        "trace": trace,
    }
)
NAMES = tuple(WORKLOADS)


def choices(
    name: str,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    ranks: int,
    rank: int,
    seed: int = 0,
    step: int = 0,
    trace: Trace | None = None,
) -> np.ndarray:
    """The experts that each token of *rank* goes to.

    Args:
        name: one of :data:`NAMES`.
        tokens: ``T`` of each rank.
        experts: ``E``, over all ranks.
        top_k: ``K``.
        ranks: ``R``.
        rank: whose tokens.
        seed: other seeds give other draws, and others a popular expert.
        step: likewise; and ``drift`` and ``bursts`` change with it.
        trace: for the workload of that name; left out, one that comes with hyperep.

    Returns:
        int64 ``[T, K]``, ``[0, K]`` for the rank without tokens. The experts of a token are distinct, but for
        ``hot-expert``.

    Raises:
        ValueError: there is no such workload, the sizes do not fit, or the trace does not fit them.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; choose one of {', '.join(NAMES)}")
    if not (tokens >= 0 and 1 <= top_k <= experts):
        raise ValueError(f"tokens={tokens} must not be negative, and top_k={top_k} be 1 to experts={experts}")
    if not 0 <= rank < ranks or experts % ranks:
        raise ValueError(f"rank={rank} must be 0 to {ranks - 1}, and ranks={ranks} divide experts={experts}")
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed} and step={step} must not be negative")
    rng = np.random.default_rng([seed, step, rank, NAMES.index(name)])
    call = Call(
        tokens=tokens, experts=experts, top_k=top_k, ranks=ranks, rank=rank, seed=seed, step=step, trace=trace, rng=rng
    )
    return WORKLOADS[name](call)


def counts(
    name: str,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    ranks: int,
    seed: int = 0,
    step: int = 0,
    trace: Trace | None = None,
) -> np.ndarray:
    """How many choices of each rank are which expert, int64 ``[R, E]``; arguments and errors as for :func:`choices`."""
    found = np.zeros((ranks, experts), dtype=np.int64)
    for rank in range(ranks):
        chosen = choices(
            name, tokens=tokens, experts=experts, top_k=top_k, ranks=ranks, rank=rank, seed=seed, step=step, trace=trace
        )
        found[rank] = np.bincount(chosen.ravel(), minlength=experts)
    return found
