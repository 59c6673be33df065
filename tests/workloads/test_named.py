# SPDX-License-Identifier: Apache-2.0
"""The workloads by name: what each one promises, for sizes of all kinds."""

import ast
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperep.workloads import NAMES, Trace, choices, counts

DISTINCT = [name for name in NAMES if name != "hot-expert"]


@st.composite
def calls(draw):
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    experts = ranks * draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    trace = np.random.default_rng(5).random((2, 2, 7, experts)).argsort(axis=3)[..., :top_k].astype(np.uint8)
    return {
        "tokens": draw(st.integers(0, 20)),
        "experts": experts,
        "top_k": top_k,
        "ranks": ranks,
        "rank": draw(st.integers(0, ranks - 1)),
        "seed": draw(st.integers(0, 3)),
        "step": draw(st.integers(0, 9)),
        "trace": Trace(choices=trace, experts=experts),
    }


@pytest.mark.parametrize("name", NAMES)
@given(call=calls())
@settings(max_examples=60, deadline=None)
def test_choices_are_experts_and_those_of_a_token_distinct(name, call):
    found = choices(name, **call)
    idle = name == "idle-rank" and call["ranks"] > 1 and call["rank"] == call["ranks"] - 1
    assert found.dtype == np.int64
    assert found.shape == (0 if idle else call["tokens"], call["top_k"])
    assert ((found >= 0) & (found < call["experts"])).all()
    if name in DISTINCT:
        in_order = np.sort(found, axis=1)
        assert (in_order[:, 1:] > in_order[:, :-1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_choices_and_ranks_steps_and_seeds_others(name):
    sizes = {"tokens": 64, "experts": 64, "top_k": 6, "ranks": 4}
    others = [{}, {"rank": 1}, {"step": 1}, {"seed": 1}]
    if name == "trace":
        drawn = np.random.default_rng(1).random((2, 2, 256, 64)).argsort(axis=3)[..., :6].astype(np.uint8)
        sizes["trace"] = Trace(choices=drawn, experts=64)
    np.random.default_rng(0).random(3)  # whatever else is drawn
    found = [choices(name, **{**sizes, "rank": 0, **other}) for other in others]
    again = [choices(name, **{**sizes, "rank": 0, **other}) for other in others]
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert not any(np.array_equal(found[0], other) for other in found[1:])


def test_workloads_do_not_share_their_draws():
    drawn = [choices(n, tokens=40, experts=16, top_k=3, ranks=2, rank=0, step=1) for n in ("uniform", "bursts")]
    assert not np.array_equal(*drawn)


def share(name, experts, *, ranks=4, top_k=4, **others):
    """Part of each expert in all choices, ``[E]``."""
    found = counts(name, tokens=4000, experts=experts, top_k=top_k, ranks=ranks, **others)
    return found.sum(axis=0) / found.sum()


def test_uniform_is_even():
    assert share("uniform", 32) == pytest.approx(np.full(32, 1 / 32), rel=0.1)


def test_zipf_gives_the_nth_expert_an_nth_of_the_first_and_the_seed_says_which_it_is():
    weights = 1 / np.arange(1, 17)
    first = []
    for seed in range(3):
        found = share("zipf", 16, top_k=1, seed=seed)
        assert np.sort(found)[::-1] == pytest.approx(weights / weights.sum(), rel=0.15)
        first.append(int(found.argmax()))
        assert int(share("zipf", 16, top_k=1, seed=seed, step=3).argmax()) == first[-1]
    assert len(set(first)) > 1


def test_zipf_draws_a_tokens_experts_one_after_the_other():
    # Of three experts with popularity 6, 3, 2 two are drawn: the first is left out by 3/11 * 2/8 + 2/11 * 3/9.
    found = np.sort(share("zipf", 3, ranks=1, top_k=2))[::-1] * 2
    assert found[0] == pytest.approx(1 - 3 / 11 * 2 / 8 - 2 / 11 * 3 / 9, abs=0.02)


def test_hot_expert_has_half_of_all_choices_beside_its_part_of_the_others():
    found = share("hot-expert", 64, top_k=6)
    assert found[0] == pytest.approx(0.5 + 0.5 / 64, abs=0.005)
    assert found[1:] == pytest.approx(np.full(63, 0.5 / 64), rel=0.2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_hot_rank_has_half_of_all_choices_spread_over_its_experts(ranks):
    found = share("hot-rank", 64, ranks=ranks).reshape(ranks, -1)
    assert found[0].sum() == pytest.approx(0.5 + 0.5 / ranks, abs=0.01)
    assert found[0].max() < 1.2 * found[0].mean()
    assert found[1:].max() < 1.2 * found[1:].mean()


def test_drift_moves_by_an_expert_each_step():
    for step in (0, 1, 30, 31):
        found = share("drift", 32, step=step)
        hot = sorted(np.argsort(found)[-4:].tolist())
        assert hot == sorted((step + i) % 32 for i in range(4))
        assert found[hot].sum() == pytest.approx(0.5 + 0.5 / 8, abs=0.02)


def test_bursts_come_each_fourth_step_elsewhere():
    hot = []
    for step in range(9):
        found = share("bursts", 32, top_k=2, step=step)
        if step % 4:
            assert found.max() < 1.3 / 32
        else:
            hot.append(frozenset(np.argsort(found)[-2:].tolist()))
            assert found[list(hot[-1])].sum() == pytest.approx(0.75 + 0.25 / 16, abs=0.02)
    assert len(set(hot)) == 3


def test_idle_rank_has_no_tokens_and_the_others_have_theirs():
    found = counts("idle-rank", tokens=100, experts=8, top_k=2, ranks=4)
    assert found.sum(axis=1).tolist() == [200, 200, 200, 0]
    assert counts("idle-rank", tokens=100, experts=8, top_k=2, ranks=1).sum() == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "zipfy"}, "unknown workload 'zipfy'; choose one of uniform, zipf, hot-expert"),
        ({"top_k": 9}, "top_k=9 be 1 to experts=8"),
        ({"ranks": 3}, "ranks=3 divide experts=8"),
        ({"rank": 2}, "rank=2 must be 0 to 1"),
        ({"step": -1}, "step=-1 must not be negative"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    call = {"name": "uniform", "tokens": 4, "experts": 8, "top_k": 2, "ranks": 2, "rank": 0}
    with pytest.raises(ValueError, match=message):
        choices(**{**call, **change})


def test_they_take_numpy_alone():
    code = (
        "import sys, numpy; numpy.random.default_rng(0); before = set(sys.modules)\n"
        "from hyperep.workloads import choices\n"
        "choices('zipf', tokens=4, experts=8, top_k=2, ranks=2, rank=0)\n"
        "print(sorted({n.partition('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert set(ast.literal_eval(end.stdout)) - {"numpy"} == {"hyperep"}
