# SPDX-License-Identifier: Apache-2.0
"""One seed gives one sequence of losses, however many ranks there are and however experts are spread."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform, run
from hyperep.train import gradients, trainer, verify
from hyperep.train.batches import own_part
from hyperep.train.trainer import new_state, train_step
from hyperep.train.verify import Deviation, Verdict, change_deviation

pytestmark = pytest.mark.usefixtures("no_pictures")

SPREADS = [
    (2, {}),
    (4, {}),
    (2, {"style": "tp", "tp": 2}),
    (4, {"style": "tp", "tp": 2}),
    (4, {"style": "etp", "tp": 2}),
    (4, {"balance_experts": 2}),
    (2, {"chunks": 3}),
]


def values(records, name):
    return [record[name] for record in records]


@pytest.mark.parametrize(("ranks", "changes"), SPREADS)
def test_nothing_depends_on_the_ranks(train, small, ranks, changes):
    _, expected = train(1, small())
    summary, found = train(ranks, small(verify=True, **changes))
    # At the full rate from the first step on, so a gradient of the wrong scale shows in the second loss.
    assert values(expected, "loss")[-1] < values(expected, "loss")[0] - 0.3
    np.testing.assert_allclose(values(found, "loss"), values(expected, "loss"), rtol=1e-5)
    np.testing.assert_allclose(values(found, "gradient_norm"), values(expected, "gradient_norm"), rtol=1e-4)
    assert values(found, "layer_load") == values(expected, "layer_load")
    assert summary["verified"] is True
    assert summary["largest_deviation"] < 1e-5


def test_double_precision_keeps_losses_together(train, small):
    single, double = (train(2, small(verify=True, dtype=dtype))[0] for dtype in ("float32", "float64"))
    assert double["largest_deviation"] < 1e-13 < single["largest_deviation"] < 1e-5


def test_load_counts_every_choice_of_every_rank(train, small):
    settings = small(steps=1)
    _, (record,) = train(2, settings)
    choices = settings.batch_tokens * settings.top_k
    assert [sum(load) for load in record["layer_load"]] == [choices] * settings.layers
    assert record["expert_load"] == np.sum(record["layer_load"], axis=0).tolist()


def test_another_seed_gives_other_losses(train, small):
    assert train(1, small())[1][0]["loss"] != train(1, small(seed=1))[1][0]["loss"]


def _sum_nothing(platform, parameters, own, parallel, others=()):
    _, totals = gradients_sum(platform, parameters, own, parallel, others)
    return dict(own), totals


def _sum_experts_too(platform, parameters, own, parallel, others=()):
    if parallel.mesh is None:
        return dict(own), list(others)
    group = parallel.mesh.get_group(0)
    _, totals = gradients_sum(platform, parameters, own, parallel, others)
    return dict(zip(own, gradients.reduce_together(platform, list(own.values()), group), strict=True)), totals


gradients_sum = gradients.sum_gradients


def _all_too_large(platform, parameters, own, parallel, others=()):
    """Clipping divides it away before anything is changed."""
    summed, totals = gradients_sum(platform, parameters, own, parallel, others)
    return {n: g * (1.0 if parallel.mesh is None else parallel.data_ranks) for n, g in summed.items()}, totals


def _gate_too_large(platform, parameters, own, parallel, others=()):
    """The global norm hardly sees it, and AdamW divides it away."""
    summed, totals = gradients_sum(platform, parameters, own, parallel, others)
    factor = 1.0 if parallel.mesh is None else 1.2
    return {n: g * factor if n.endswith("gate") else g for n, g in summed.items()}, totals


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("fault", [_sum_nothing, _sum_experts_too, _all_too_large, _gate_too_large])
def test_verification_fails_where_gradients_are_reduced_wrongly(train, small, monkeypatch, fault, dtype):
    monkeypatch.setattr(trainer, "sum_gradients", fault)
    summary, records = train(2, small(verify=True, dtype=dtype, clip_norm=0.1))
    assert all(record["gradient_norm"] > 0.1 for record in records)
    assert summary["verified"] is False
    assert len(records) == 4  # all of the run is there to be looked at
    (verdict,) = (line for line in summary["lines"] if "DIFFER" in line)
    if fault is _gate_too_large:
        assert re.search(r"in the (mean|square) of layer\d\.moe\.router\.gate \(allowed", verdict)


def test_verification_fails_where_losses_are_wrong(train, small, monkeypatch):
    def unsharded(*arguments):
        state, result = train_step(*arguments)
        return state, replace(result, loss=result.loss * 1.001)

    monkeypatch.setattr(verify, "train_step", unsharded)
    summary, _ = train(1, small(verify=True))
    assert summary["verified"] is False
    assert summary["largest_deviation"] == pytest.approx(1e-3, rel=1e-2)


def test_verification_fails_where_a_part_is_not_updated(train, small, monkeypatch):
    """Losses do not tell: the unsharded model begins each step from the same weights, right or wrong."""
    assign = LoopbackPlatform.assign

    def forgetful(self, parameter, value):
        if self.sharding(parameter) is None or self.rank == 0:
            assign(self, parameter, value)

    monkeypatch.setattr(LoopbackPlatform, "assign", forgetful)
    summary, _ = train(2, small(verify=True))
    assert summary["verified"] is False
    assert summary["largest_deviation"] < 1e-12
    assert any("in layer0.moe.experts.w" in line or "in layer1.moe.experts.w" in line for line in summary["lines"])


def test_the_unsharded_model_begins_where_the_sharded_one_began(train, small, monkeypatch):
    step = verify.Reference.step

    def from_elsewhere(self, *arguments):
        if self._state is not None:
            for parameter in self._state.parameters.values():
                self._platform.assign(parameter, self._platform.local(parameter) * 1.01)
        return step(self, *arguments)

    monkeypatch.setattr(verify.Reference, "step", from_elsewhere)
    summary, _ = train(2, small(verify=True))
    assert summary["verified"] is True
    assert summary["largest_deviation"] < 1e-12


def test_where_no_step_was_taken_nothing_was_verified():
    verdict = Verdict(loss=Deviation(), norm=Deviation(), change=Deviation(), changed="gate", tolerance=0.1)
    assert not verdict.passed
    assert verdict.describe() == "nothing was verified: no step was taken"


def test_a_change_is_compared_with_the_change_and_not_with_the_weights():
    begin = np.full(4, 1000.0, np.float32)
    assert change_deviation(begin, begin + 1, begin + 2) == pytest.approx(0.5)
    assert change_deviation(begin, begin, begin) == 0.0
    assert change_deviation(begin, begin + 1, begin) == math.inf


def test_a_verdict_names_the_tensor_and_where_it_was():
    verdict = Verdict(
        loss=Deviation(0.0, 1),
        norm=Deviation(0.0, 1),
        change=Deviation(0.5, 3),
        changed="the mean of gate",
        tolerance=0.1,
    )
    assert not verdict.passed
    assert "5.00e-01, at step 3 in the mean of gate (allowed: 0.1)" in verdict.describe()


def test_the_largest_deviation_is_kept_and_no_number_is_larger_than_any():
    assert Deviation().or_larger(0.0, 1) == Deviation(0.0, 1)
    first = Deviation().or_larger(0.2, 1, 5)
    assert first.or_larger(0.1, 2, 6) == first
    assert first.or_larger(math.nan, 3, 7) == Deviation(math.inf, 3, 7)
    assert first.or_larger(math.nan, 3, 7).or_larger(0.5, 4).step == 3


def test_one_host_copy_a_step_besides_those_of_dispatch(small):
    settings = small()

    def copies(platform):
        state = new_state(platform, settings)
        batch = np.zeros((settings.sequences, settings.seq_len + 1), np.int64)
        calls = []
        original = platform.to_host
        platform.to_host = lambda *tensors: calls.append(len(tensors)) or original(*tensors)
        # What the experts need, which on NumPy is more than the one copy of a dispatch.
        state.model(platform.from_host(own_part(batch, platform.rank, 2)[:, :-1]))
        forward = len(calls)
        train_step(platform, settings, state, batch)
        return len(calls) - 2 * forward

    assert run(copies, 2) == [1, 1]
