# SPDX-License-Identifier: Apache-2.0
"""Why outputs are wrong: pure functions of what was observed and of the reference's terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hyperep.audit.candidate import Candidate, Deviation, factor_names
from hyperep.audit.claims import Claims
from hyperep.audit.evidence import Block, output_blocks, token_gradient_blocks
from hyperep.audit.fit import deviating, error_of, fit, fit_one, rows_agree, scale_of
from hyperep.audit.patterns import patterns, questions
from hyperep.audit.reference import Terms
from hyperep.audit.rivals import rivals_of

__all__ = ["by_patterns", "judge_output", "judge_token_gradient"]

Arrays = Sequence[np.ndarray]

_OUTPUT_GROUPS = ((), ("way",), ("owner",), ("slot",), ("expert", "owner"), ("expert", "owner", "slot", "place", "way"))
_TOKEN_GROUPS = ((), ("way",), ("owner",), ("way", "owner"))


def judge_output(claims: Claims, terms: Sequence[Terms], observed: Arrays) -> Deviation | None:
    """What is wrong with the outputs ``[T, D]`` of all ranks, if anything is."""
    special = _shapes_and_numbers("output", [t.output for t in terms], observed)
    if special is not None or rows_agree([t.output for t in terms], observed, claims.tolerance):
        return special
    blocks = output_blocks(claims, terms, observed)
    wrong, error = deviating(blocks, claims.tolerance)
    if not wrong:
        return None
    ranks = len(terms)
    found = by_patterns("output", claims, ranks, blocks, _OUTPUT_GROUPS)
    found += _rows_exchanged("output", claims, [t.output for t in terms], observed)
    fitted = _combine_matrix(claims, terms, observed)
    if fitted is not None:
        found += _experts_exchanged(claims, terms, fitted)
        found += _scores_changed(claims, terms, fitted)
    return Deviation(quantity="output", error=error, candidates=_sorted(found, "output"))


def judge_token_gradient(
    claims: Claims, terms: Sequence[Terms], observed: Sequence[np.ndarray | None]
) -> Deviation | None:
    """What is wrong with the gradients of the tokens ``[T, D]`` of all ranks, if anything is."""
    lacking = [rank for rank, gradient in enumerate(observed) if gradient is None and len(terms[rank].tokens)]
    if lacking:
        candidate = Candidate(cause="absent", quantity="tokens", where="rank", values=tuple(lacking), cost=0.5)
        return Deviation(quantity="tokens", error=1.0, candidates=(candidate,))
    there = [np.zeros_like(t.tokens) if g is None else g for t, g in zip(terms, observed, strict=True)]
    special = _shapes_and_numbers("tokens", [t.token_gradient for t in terms], there)
    if special is not None or rows_agree([t.token_gradient for t in terms], there, claims.tolerance):
        return special
    blocks = token_gradient_blocks(claims, terms, there)
    wrong, error = deviating(blocks, claims.tolerance)
    if not wrong:
        return None
    found = by_patterns("tokens", claims, len(terms), blocks, _TOKEN_GROUPS)
    found += _rows_exchanged("tokens", claims, [t.token_gradient for t in terms], there)
    found += _other_formula(claims, terms, there)
    return Deviation(quantity="tokens", error=error, candidates=_sorted(found, "tokens"))


def by_patterns(
    quantity: str, claims: Claims, ranks: int, blocks: Sequence[Block], groupings: Sequence[Sequence[str]]
) -> list[Candidate]:
    """Candidates of all groupings of terms that explain what was observed."""
    found: dict[tuple[object, ...], Candidate] = {}
    blocks = _sample(blocks, claims.tolerance)
    close = 0.01 if claims.tolerance < 0.01 else 0.2
    for grouping in groupings:
        fitted = fit(blocks, grouping, claims.tolerance)
        if fitted.residual > claims.tolerance * 2:
            continue
        for pattern in patterns(fitted.entries, close):
            key = (pattern.kind, pattern.name, pattern.values if pattern.name == "place" else ())
            if key in found:
                continue
            found[key] = Candidate(
                cause=pattern.kind,
                quantity=quantity,
                where=pattern.name,
                values=pattern.values,
                factor=pattern.factor,
                names=factor_names(pattern.factor, claims, ranks),
                cost=pattern.cost,
                residual=fitted.residual,
            )
    for name, value, cost, has in questions(label for block in blocks for label in block.labels):
        factor, residual = fit_one(blocks, has)
        kind = "lost" if abs(factor) <= close else "scaled"
        if residual > claims.tolerance * 2 or abs(factor - 1) <= close or any(k[:2] == (kind, name) for k in found):
            continue
        found[kind, name, value] = Candidate(
            cause=kind,
            quantity=quantity,
            where=name,
            values=(value,),
            factor=0.0 if kind == "lost" else factor,
            names=factor_names(0.0 if kind == "lost" else factor, claims, ranks),
            cost=cost + 0.1,
            residual=residual,
        )
    return list(found.values())


_ENOUGH = 40
"""Blocks that show a pattern as well as any number of them."""


def _sample(blocks: Sequence[Block], tolerance: float) -> list[Block]:
    """Some of the blocks, wrong and right ones, from the first to the last."""
    scale = scale_of(blocks)
    wrong = [block for block in blocks if error_of(block, scale) > tolerance]
    right = [block for block in blocks if error_of(block, scale) <= tolerance]
    return [*_spread(wrong, _ENOUGH - min(len(right), _ENOUGH // 2)), *_spread(right, _ENOUGH // 2)]


def _spread(blocks: Sequence[Block], number: int) -> list[Block]:
    return list(blocks) if len(blocks) <= number else [blocks[i * len(blocks) // number] for i in range(number)]


def _sorted(found: Sequence[Candidate], quantity: str) -> tuple[Candidate, ...]:
    unknown = Candidate(cause="unknown", quantity=quantity, cost=12.0, residual=1.0)
    return tuple(sorted([*found, unknown], key=lambda candidate: candidate.cost))


def _shapes_and_numbers(quantity: str, expected: Arrays, observed: Arrays) -> Deviation | None:
    """What can be said before anything is fitted."""
    for rank, (right, found) in enumerate(zip(expected, observed, strict=True)):
        if right.shape != found.shape:
            detail = f"rank {rank} has {list(found.shape)}, and not {list(right.shape)}"
            candidate = Candidate(cause="shape", quantity=quantity, detail=detail, cost=0.2)
            return Deviation(quantity=quantity, error=np.inf, candidates=(candidate,))
    bad = [int((~np.isfinite(found).all(axis=1)).sum()) for found in observed]
    if any(bad):
        detail = ", ".join(f"{n} of {len(observed[r])} rows on rank {r}" for r, n in enumerate(bad) if n)
        candidate = Candidate(cause="not-finite", quantity=quantity, detail=detail, cost=0.3)
        return Deviation(quantity=quantity, error=np.inf, candidates=(candidate,))
    return None


def _rows_exchanged(quantity: str, claims: Claims, expected: Arrays, observed: Arrays) -> Iterator[Candidate]:
    """Whether each wrong row is the right row of another token."""
    rows = [(rank, t, row) for rank, of_rank in enumerate(expected) for t, row in enumerate(of_rank)]
    every = np.array([row for *_, row in rows])
    pairs, across = [], False
    scale = float(np.sqrt(np.mean(every**2))) * np.sqrt(every.shape[1]) if len(every) else 0.0
    for i, (rank, t, right) in enumerate(rows):
        found = observed[rank][t]
        if np.linalg.norm(found - right) <= claims.tolerance * max(float(np.linalg.norm(right)), 0.2 * scale):
            continue
        distance = np.linalg.norm(every - found, axis=1)
        nearest = int(distance.argmin())
        if distance[nearest] > 2 * claims.tolerance * max(float(np.linalg.norm(found)), 0.2 * scale) or nearest == i:
            return
        pairs.append((rank, t, rows[nearest][:2]))
        across = across or rows[nearest][0] != rank
    if pairs and float(np.linalg.norm(observed[pairs[0][0]][pairs[0][1]])) > 0:
        rank, t, (other_rank, other) = pairs[0]
        where = f"token {t} of rank {rank} has what is token {other}'s" + (f" of rank {other_rank}" if across else "")
        detail = f"{len(pairs)} of {len(rows)} rows, for instance {where}"
        yield Candidate(cause="rows-exchanged", quantity=quantity, detail=detail, cost=2.3)


def _other_formula(claims: Claims, terms: Sequence[Terms], observed: Arrays) -> Iterator[Candidate]:
    """Whether the gradients are what a known mistake in the backward pass gives."""
    of_ranks = [rivals_of(of_rank).tokens for of_rank in terms]
    for fault in of_ranks[0]:
        rivals = [of_rank[fault] for of_rank in of_ranks]
        lost = sum(float(((a - b) ** 2).sum()) for a, b in zip(rivals, observed, strict=True))
        size = sum(float((a**2).sum()) for a in rivals)
        if size > 0 and np.sqrt(lost / size) < 2 * claims.tolerance:
            yield Candidate(cause="backward-formula", quantity="tokens", detail=fault, cost=2.2)


def _combine_matrix(claims: Claims, terms: Sequence[Terms], observed: Arrays) -> list[np.ndarray] | None:
    """``[T, E]`` of each rank: how often each expert's output is in each token's; ``None`` if that explains nothing."""
    found, lost, size = [], 0.0, 0.0
    for of_rank, output in zip(terms, observed, strict=True):
        matrix = np.zeros_like(of_rank.combine)
        for t in range(len(matrix)):
            routed = output[t] - of_rank.shared[t]
            basis = of_rank.outputs[:, t].T  # [D, E]
            matrix[t] = np.linalg.lstsq(basis, routed, rcond=None)[0]
            lost += float(((routed - basis @ matrix[t]) ** 2).sum())
            size += float((routed**2).sum())
        found.append(matrix)
    return found if size > 0 and np.sqrt(lost / size) < 2 * claims.tolerance else None


def _experts_exchanged(claims: Claims, terms: Sequence[Terms], fitted: Arrays) -> Iterator[Candidate]:
    """Whether tokens got the output of other experts than those that they chose, by a fixed map."""
    right, found = np.concatenate([t.coefficients for t in terms]), np.concatenate(fitted)
    experts, ranks = claims.sizes.experts, len(terms)
    local, e = experts // ranks, np.arange(experts)
    size = float(np.linalg.norm(right)) or 1.0

    def error(map_: np.ndarray) -> float:
        moved = np.zeros_like(right)
        np.add.at(moved.T, map_, right.T)
        return float(np.linalg.norm(moved - found)) / size

    maps: dict[str, np.ndarray] = {}
    if ranks > 1:
        maps["every rank computes with the experts of rank 0"] = e % local
        maps["experts are dealt to ranks in turn, and not in equal runs"] = (e % local) * ranks + e // local
        maps["experts lie in turn on the ranks, and tokens are sent as if in equal runs"] = (
            e % ranks
        ) * local + e // ranks
        maps["the ranks' experts are in the reverse order of ranks"] = (ranks - 1 - e // local) * local + e % local
        for shift in range(1, ranks):
            maps[f"experts are those of {shift} rank{'s' * (shift > 1)} further"] = (e + shift * local) % experts
    maps["each rank's experts are in the reverse order"] = e // local * local + local - 1 - e % local
    for shift in (1, experts - 1):
        maps[f"experts are off by {1 if shift == 1 else -1}"] = (e + shift) % experts
    columns = _matched_columns(right, found, claims)
    if columns is not None:
        maps[", ".join(f"expert {j} answers for {i}" for i, j in enumerate(columns) if i != j)] = columns
    for detail, map_ in maps.items():
        if not np.array_equal(map_, e) and error(map_) < _loose(claims):
            yield Candidate(cause="experts-exchanged", quantity="output", detail=detail, cost=2.5, residual=error(map_))
            return


def _matched_columns(right: np.ndarray, found: np.ndarray, claims: Claims) -> np.ndarray | None:
    """The expert whose column in *found* equals the column that each expert should have."""
    columns = np.arange(right.shape[1])
    for e in np.flatnonzero(np.abs(right).sum(axis=0)):
        distance = np.linalg.norm(found - right[:, e : e + 1], axis=0)
        columns[e] = int(distance.argmin())
        if distance[columns[e]] > 2 * _loose(claims) * np.linalg.norm(right[:, e]):
            return None
    used = np.flatnonzero(np.abs(right).sum(axis=0))
    return columns if len(set(columns[used])) == len(used) else None


def _loose(claims: Claims) -> float:
    return 0.02 if claims.tolerance < 0.01 else 0.25


def _scores_changed(claims: Claims, terms: Sequence[Terms], fitted: Arrays) -> Iterator[Candidate]:
    """Whether the experts are right, and their scores are not."""
    right, found = np.concatenate([t.coefficients for t in terms]), np.concatenate(fitted)
    if not terms[0].weighted_output or not len(right):
        return
    chosen, plain = right != 0, np.concatenate([t.plain for t in terms])
    size, loose = float(np.linalg.norm(right)) or 1.0, _loose(claims)
    if np.linalg.norm(np.where(chosen, 0.0, found)) > loose * size:
        return
    total = np.where(chosen, plain, 0.0).sum(axis=1, keepdims=True)
    total = np.where(total == 0, 1.0, total)
    formulas: dict[str, np.ndarray] = {
        "not applied": chosen * 1.0,
        "not applied, but for their sum": chosen / claims.sizes.top_k,
        "applied twice": right**2,
        "not divided by their sum": claims.scale * plain * chosen,
        "divided by their sum": claims.scale * plain * chosen / total,
    }
    if claims.sizes.top_k == 1:  # dividing and not applying are the same then
        formulas = {"divided by their sum, which is the score itself: the router learns nothing": chosen * claims.scale}

    for formula, values in formulas.items():
        if np.linalg.norm(values - right) > 2 * loose * size and np.linalg.norm(values - found) < loose * size:
            yield Candidate(cause="scores-formula", quantity="output", detail=formula, cost=2.2)
    order = np.concatenate([t.order for t in terms])
    by_number = np.sort(order, axis=1)
    orders = {
        "those of the same token's other choices, in reverse": (order[:, ::-1], order),
        "those of the same token's choices, moved by one": (np.roll(order, 1, axis=1), order),
        "those of its choices in the order of the experts' numbers": (order, by_number),
        "those of its choices, as if these were in the order of the experts' numbers": (by_number, order),
    }
    for how, (receiving, giving) in orders.items():
        moved = np.zeros_like(right)
        np.put_along_axis(moved, receiving, np.take_along_axis(right, giving, axis=1), axis=1)
        if np.linalg.norm(moved - right) > 2 * loose * size and np.linalg.norm(moved - found) < loose * size:
            yield Candidate(cause="scores-exchanged", quantity="output", detail=how, cost=2.2)
    if all(_same_numbers(t.coefficients, f, loose) for t, f in zip(terms, fitted, strict=True)):
        detail = "those of other tokens, or choices, of the same rank"
        yield Candidate(cause="scores-exchanged", quantity="output", detail=detail, cost=2.4)


def _same_numbers(right: np.ndarray, found: np.ndarray, loose: float) -> bool:
    chosen = right != 0
    return bool(np.abs(np.sort(right[chosen]) - np.sort(found[chosen])).max(initial=0.0) < loose)
