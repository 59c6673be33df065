# SPDX-License-Identifier: Apache-2.0
"""The parts of the model and the loss, against what they are defined to be."""

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.train.attention import rotary_tables
from hyperep.train.loss import cross_entropy, imbalance_loss
from hyperep.train.model import LanguageModel, expert_modules
from hyperep.train.trainer import find_gradients, new_state


@pytest.fixture
def platform():
    return LoopbackPlatform()


def test_no_position_sees_what_comes_after_it(platform, small):
    settings = small()
    model = LanguageModel(platform, settings)
    tokens = np.random.default_rng(0).integers(0, 256, size=(2, 16))
    changed = tokens.copy()
    changed[:, 9] += 1
    changed %= 256
    before, after = (model(platform.from_host(t))[0].reshape(2, 16, 256) for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    # All later positions do see it.
    assert (np.abs(before[:, 9:] - after[:, 9:]).max(axis=2) > 1e-5).all()


def test_sequences_do_not_see_each_other(platform, small):
    model = LanguageModel(platform, small())
    tokens = np.random.default_rng(0).integers(0, 256, size=(3, 16))
    together = model(platform.from_host(tokens))[0].reshape(3, 16, 256)
    alone = model(platform.from_host(tokens[1:2]))[0]
    np.testing.assert_allclose(together[1], alone, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_trains_the_router_whatever_the_number_of_choices(platform, small, top_k):
    settings = small(top_k=top_k, balance=0.0, dtype="float64")  # the balance loss would train it anyway
    state = new_state(platform, settings, unsharded=True)
    batch = np.random.default_rng(0).integers(0, 256, size=(settings.sequences, settings.seq_len + 1))
    clipped = find_gradients(platform, settings, state, batch).clipped
    gates = {name: float(np.linalg.norm(gradient)) for name, gradient in clipped.items() if name.endswith("gate")}
    assert len(gates) == settings.layers
    # One score that is divided by itself is 1, whatever the router says: its gradient would be some 1e-17.
    assert min(gates.values()) > 1e-4, gates


def test_the_first_loss_is_that_of_a_uniform_guess(train, small):
    _, records = train(1, small(steps=1, dim=64))
    assert records[0]["loss"] == pytest.approx(np.log(256), abs=0.1)


def test_the_same_word_at_another_place_attends_alike():
    cosine, sine, turn = rotary_tables(32, 8)
    query, key = np.random.default_rng(0).normal(size=(2, 8))

    def score(i, j):
        q, k = (v * cosine[at] + (v @ turn) * sine[at] for v, at in ((query, i), (key, j)))
        return q @ k

    assert score(3, 1) == pytest.approx(score(30, 28), rel=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-2)


@pytest.mark.parametrize("top_k", [1, 2])
def test_what_is_predicted_trains_the_routers(platform, small, top_k):
    """The cross entropy alone, without what keeps the load even, moves every gate."""
    model = LanguageModel(platform, small(top_k=top_k))
    tokens = np.random.default_rng(0).integers(0, 256, size=(4, 17))
    parameters = platform.parameters(model)
    gates = {path: gate for path, gate in parameters.items() if path.endswith("router.gate")}
    # A head of size one instead of the small initial one, so that gradients are of size one.
    platform.assign(parameters["head"], 50 * platform.local(parameters["head"]))
    targets = tokens[:, 1:].reshape(-1)
    _, pullback = platform.vjp(
        lambda: cross_entropy(platform, model(tokens[:, :-1])[0], targets, targets.size),
        parameters=list(gates.values()),
    )
    for path, gradient in zip(gates, pullback(np.ones((), np.float32)), strict=True):
        assert np.abs(gradient).max() > 1e-3, path


def test_cross_entropy_is_a_part_of_the_global_mean(platform):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(6, 256)).astype(np.float32) * 3 + 100, rng.integers(0, 256, size=6)
    exact = logits.astype(np.float64)
    expected = sum(np.log(np.exp(row - 100).sum()) + 100 - row[t] for row, t in zip(exact, targets, strict=True)) / 24
    assert cross_entropy(platform, logits, targets, 24) == pytest.approx(expected, rel=1e-6)


def test_imbalance_losses_of_parts_add_up_to_that_of_the_whole(platform, small):
    settings = small()
    model = LanguageModel(platform, settings)
    tokens = np.random.default_rng(0).integers(0, 256, size=(8, 16))

    def loss(part):
        _, stats = model(platform.from_host(part))
        return float(imbalance_loss(platform, [layer.routing for layer in stats], len(part), 8))

    assert loss(tokens[:2]) + loss(tokens[2:]) == pytest.approx(loss(tokens), rel=1e-5)
    assert 0.9 < loss(tokens) < settings.experts


def test_there_is_one_module_of_experts_a_layer(platform, small):
    model = LanguageModel(platform, small(layers=3))
    assert list(expert_modules(platform, model)) == [f"layer{i}.moe.experts" for i in range(3)]
