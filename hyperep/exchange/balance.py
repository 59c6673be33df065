# SPDX-License-Identifier: Apache-2.0
"""Which experts are computed in several places for one step, so that no rank has much more to do than others.

Everything here is a function of counts that all ranks know: integers, and no tie is left open, so every rank comes to
the same plan by itself. An expert of a rank with too many rows is copied to a rank with few, which takes some of its
rows; its owner keeps a part. Copies live for one step: their gradients go home, and owners' parameters, optimizers and
checkpoints see nothing of them.

Two ranks of two experts, and room for one copy on each::

    rows of experts   e0: 60  e1: 4 | e2: 8  e3: 8     rank 0: 64   rank 1: 16     bound 1.1 * 40 = 44
    a copy of e0 on rank 1 takes 24                    rank 0: 40   rank 1: 40

Copying experts by load for the length of a step is the idea of LLEP (least-loaded expert parallelism,
arXiv:2601.17111).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Balance", "Copy", "Placement", "plan"]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How far loads are evened out.

    Args:
        slots: copies that a rank computes beside its own experts, at most.
        max_imbalance: rows of the fullest rank over the mean, up to which nothing is copied.
        rows_per_copy: rows that a copy must take over to be worth the transport of its weights and their gradients;
            left out, so many as have the bytes of the weights.

    Raises:
        ValueError: no slots, an imbalance below one, or fewer rows than none.
    """

    slots: int = 2
    max_imbalance: float = 1.15
    rows_per_copy: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < 1:
            raise ValueError(f"Balance(slots={self.slots!r}): give a whole number, 1 or more")
        if not self.max_imbalance >= 1:
            raise ValueError(f"Balance(max_imbalance={self.max_imbalance!r}): at 1 all ranks are even; give 1 or more")
        if self.rows_per_copy is not None and self.rows_per_copy < 0:
            raise ValueError(f"Balance(rows_per_copy={self.rows_per_copy!r}): give 0 or more")

    def worth(self, expert_numbers: int, token_numbers: int) -> int:
        """Rows that a copy must take over, of an expert of so many weights and tokens of so many numbers."""
        if self.rows_per_copy is not None:
            return self.rows_per_copy
        # There and back, against a row there and back and its gradients.
        return 2 * expert_numbers // (4 * max(token_numbers, 1))

    def plan(self, counts: np.ndarray, rows_per_copy: int) -> Placement:
        """The plan for counts ``[R, E]``: what the layer does, for whoever has the counts; see :func:`plan`."""
        return plan(counts, slots=self.slots, max_imbalance=self.max_imbalance, rows_per_copy=rows_per_copy)


class Copy(NamedTuple):
    """An expert on a rank that is not its owner."""

    rank: int
    expert: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """What is computed where in one step."""

    counts: np.ndarray
    """Choices by source rank and expert, int64 ``[R, E]``."""
    copies: tuple[Copy, ...]
    """By rank, and on one rank by expert: so the slots of a rank are filled in the order of owners."""
    taken: np.ndarray
    """How many of each source rank's choices of its expert each copy takes, int64 ``[copies, R]``."""
    bound: int
    """Rows up to which a rank is not relieved."""

    @property
    def ranks(self) -> int:
        """``R``."""
        return int(self.counts.shape[0])

    @property
    def experts(self) -> int:
        """``E``."""
        return int(self.counts.shape[1])

    @property
    def owned(self) -> int:
        """``L``, experts of a rank's own."""
        return self.experts // self.ranks

    @property
    def before(self) -> tuple[int, ...]:
        """Rows of each rank without copies."""
        return tuple(self.counts.sum(axis=0).reshape(self.ranks, -1).sum(axis=1).tolist())

    @property
    def loads(self) -> tuple[int, ...]:
        """Rows of each rank."""
        loads = list(self.before)
        for copy, rows in zip(self.copies, self.taken.sum(axis=1).tolist(), strict=True):
            loads[copy.rank] += rows
            loads[copy.expert // self.owned] -= rows
        return tuple(loads)

    @property
    def rows_moved(self) -> int:
        """Rows that are computed by copies."""
        return int(self.taken.sum())

    @property
    def within(self) -> bool:
        """Whether every rank is within the bound; where it is not, slots are too few or copies do not pay."""
        return max(self.loads) <= self.bound

    def slots(self, rank: int) -> tuple[int, ...]:
        """The experts that *rank* has copies of."""
        return tuple(copy.expert for copy in self.copies if copy.rank == rank)

    @property
    def width(self) -> int:
        """Experts that a rank computes at most, its own and copies: what places are numbered by."""
        taken = [copy.rank for copy in self.copies]
        return self.owned + max((taken.count(rank) for rank in set(taken)), default=0)

    def places(self, source: int) -> np.ndarray:
        """Where the choices of *source* are computed, sorted by expert: int64, rank ``r``'s from ``r * width`` on.

        A rank's own experts are ``0 .. L - 1`` there, and its copies follow. Of the choices of one expert the
        first ones go to copies.
        """
        width, own = self.width, np.arange(self.experts)
        row = self.counts[source]
        found = np.repeat(own // self.owned * width + own % self.owned, row)
        begin = np.cumsum(row) - row
        taken: dict[int, int] = {}
        slot: dict[int, int] = {}
        for copy, rows in zip(self.copies, self.taken[:, source].tolist(), strict=True):
            number = slot.get(copy.rank, 0)
            slot[copy.rank] = number + 1
            first = int(begin[copy.expert]) + taken.get(copy.expert, 0)
            found[first : first + rows] = copy.rank * width + self.owned + number
            taken[copy.expert] = taken.get(copy.expert, 0) + rows
        return found

    def rows_of(self, rank: int) -> tuple[int, int]:
        """Rows that *rank* computes with its own experts, and with copies."""
        copied = sum(int(rows.sum()) for copy, rows in zip(self.copies, self.taken, strict=True) if copy.rank == rank)
        return self.loads[rank] - copied, copied

    def sent(self, rank: int) -> tuple[list[int], list[int]]:
        """Experts of *rank*, numbered from its first one, in the order in which they are sent; and how many to each."""
        first = rank * self.owned
        mine = [copy for copy in self.copies if first <= copy.expert < first + self.owned]
        return [copy.expert - first for copy in mine], [
            sum(copy.rank == to for copy in mine) for to in range(self.ranks)
        ]

    def received(self, rank: int) -> list[int]:
        """How many copies *rank* gets from each rank; they arrive in the order of its slots."""
        owners = [expert // self.owned for expert in self.slots(rank)]
        return [owners.count(owner) for owner in range(self.ranks)]


def plan(counts: np.ndarray, *, slots: int, max_imbalance: float, rows_per_copy: int = 0) -> Placement:
    """Relieve the fullest rank of its heaviest expert's rows until all are within the bound, or nothing helps.

    Greedy: it may miss a bound that some other choice of as many copies would keep, and says so (``within``).

    Args:
        counts: choices by source rank and expert, integers ``[R, E]``; rank ``r`` owns ``r * E / R`` and following.
        slots: copies that a rank takes, at most.
        max_imbalance: rows of a rank over the mean that are left alone.
        rows_per_copy: rows that a copy must take over, so that nothing is copied that does not pay.

    Raises:
        ValueError: the experts do not divide by the ranks.
    """
    counts = np.asarray(counts, dtype=np.int64)
    ranks, experts = counts.shape
    if experts % ranks:
        raise ValueError(f"plan of {experts} experts on {ranks} ranks: they must divide")
    owned, totals = experts // ranks, counts.sum(axis=0)
    loads, kept = totals.reshape(ranks, owned).sum(axis=1).tolist(), totals.tolist()
    total = sum(loads)
    even = -(-total // ranks)
    bound = max(even, int(max_imbalance * total / ranks))
    moved = _relieve(loads, kept, owned, slots, even, bound, rows_per_copy)
    copies = sorted(Copy(rank, expert) for expert, rank in moved)
    taken = np.zeros((len(copies), ranks), dtype=np.int64)
    for expert in {copy.expert for copy in copies}:
        which = [i for i, copy in enumerate(copies) if copy.expert == expert]
        rows = np.array([moved[expert, copies[i].rank] for i in which])
        at = np.array([copies[i].rank for i in which])
        taken[which] = _from_sources(counts[:, expert], expert // owned, at, rows)
    return Placement(counts=counts, copies=tuple(copies), taken=taken, bound=bound)


def _from_sources(choices: np.ndarray, owner: int, at: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whose *choices* of an expert its copies *at* these ranks take, so many *rows* each: int64 ``[copies, R]``.

    First those of the copy's own rank, which then need not travel; then others' in turn, and the owner's last.
    """
    found = np.zeros((len(at), len(choices)), dtype=np.int64)
    own = np.minimum(choices[at], rows)
    found[np.arange(len(at)), at] = own
    left, missing = choices.copy(), rows - own
    left[at] -= own
    turn = np.concatenate([np.delete(np.arange(len(choices)), owner), [owner]])
    # What is left lies on a line, and so does what is missing: each copy takes what lies opposite.
    stops, ends = np.cumsum(left[turn]), np.cumsum(missing)[:, None]
    starts, begins = stops - left[turn], ends - missing[:, None]
    found[:, turn] += np.maximum(np.minimum(stops, ends) - np.maximum(starts, begins), 0)
    return found


def _relieve(
    loads: list[int], kept: list[int], owned: int, slots: int, even: int, bound: int, rows_per_copy: int
) -> dict[tuple[int, int], int]:
    """Rows that copies take over, by expert and rank. *loads* of ranks and rows *kept* by owners are brought up.

    Each step takes as much as makes either rank even; so a rank is relieved or filled, or an expert has no more to
    give, and there are few steps.
    """
    ranks = len(loads)
    taken: dict[tuple[int, int], int] = {}
    used = [0] * ranks
    # Ranks from the emptiest to the fullest, kept sorted.
    order = sorted((load, rank) for rank, load in enumerate(loads))
    stuck: set[int] = set()
    while True:
        over = next(((load, rank) for load, rank in reversed(order) if load > bound and rank not in stuck), None)
        if over is None:
            return taken
        source = over[1]
        move = _move(source, loads, kept, owned, slots, even, rows_per_copy, taken, used, order)
        if move is None:
            stuck.add(source)
            continue
        expert, target, rows = move
        used[target] += (expert, target) not in taken
        taken[expert, target] = taken.get((expert, target), 0) + rows
        kept[expert] -= rows
        for rank, change in ((source, -rows), (target, rows)):
            order.pop(bisect.bisect_left(order, (loads[rank], rank)))
            loads[rank] += change
            bisect.insort(order, (loads[rank], rank))


def _move(
    source: int,
    loads: list[int],
    kept: list[int],
    owned: int,
    slots: int,
    even: int,
    rows_per_copy: int,
    taken: dict[tuple[int, int], int],
    used: list[int],
    order: list[tuple[int, int]],
) -> tuple[int, int, int] | None:
    """The heaviest expert of *source* that can give rows, the emptiest rank that can take them, and how many."""
    own = range(source * owned, (source + 1) * owned)
    for expert in sorted(own, key=lambda expert: (-kept[expert], expert)):
        for load, target in order:
            room = min(loads[source] - even, even - load, kept[expert] - 1)
            if room < 1:
                break  # fuller ones have less room
            known = (expert, target) in taken
            if (known or (used[target] < slots and room >= rows_per_copy)) and target != source:
                return expert, target, room
    return None
