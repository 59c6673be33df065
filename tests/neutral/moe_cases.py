# SPDX-License-Identifier: Apache-2.0
"""The neutral mixture-of-experts layer against the plain NumPy reference. Runs on every platform."""

import dataclasses

import moe_reference as reference
import numpy as np
from measure import everywhere, fill_weights, forward_backward, relative, rows, rows_computed

import hyperep
from hyperep import moe
from hyperep.moe import PRESETS, LossCoefficients, MoEConfig, RouterConfig, build_moe

DIM, TOKENS = 5, 9


def _config(*, shared=0, capacity=None, policy="probability", **router):
    settings = RouterConfig(**{"num_experts": 8, "top_k": 3, **router})
    return MoEConfig(
        dim=DIM,
        hidden_dim=4,
        router=settings,
        num_shared_experts=shared,
        capacity_factor=capacity,
        drop_policy=policy,
    )


CONFIGS = {
    "softmax": _config(),
    "softmax, not normalised": _config(normalize=False, route_scale=1.7),
    "sigmoid": _config(score_function="sigmoid", route_scale=2.5),
    "sigmoid, not normalised": _config(score_function="sigmoid", normalize=False),
    "top-1": _config(top_k=1),
    "top-1, sigmoid": _config(top_k=1, score_function="sigmoid"),
    "all experts": _config(top_k=8),
    "groups": _config(num_groups=4, top_groups=2),
    "groups of one": _config(num_groups=8, top_groups=4),
    "bias": _config(expert_bias=True),
    "groups and bias": _config(score_function="sigmoid", num_groups=2, top_groups=1, expert_bias=True),
    "shared": _config(shared=2),
    "capacity by probability": _config(capacity=1.0),
    "capacity by position": _config(capacity=1.0, policy="position"),
    "capacity that drops nothing": _config(capacity=8.0),
    **{name: preset.config.scaled_down(dim=DIM, hidden_dim=4, num_experts=32) for name, preset in PRESETS.items()},
}


def _made(platform, config, seed=7):
    layer = build_moe(platform, config)
    fill_weights(platform, layer, seed)
    bias = None
    for buffer in platform.buffers(layer).values():
        bias = 0.3 * rows(99, config.router.num_experts)
        platform.assign(buffer, platform.from_host(bias))
    parameters = platform.parameters(layer)
    values = platform.to_host(*(platform.local(parameter) for parameter in parameters.values()))
    weights = {name: value.astype(float) for name, value in zip(parameters, values, strict=True)}
    return layer, weights, bias


def layer_agrees(platform, name, tokens=TOKENS):
    """Output, counts, drops and every gradient; gradients against central differences of the reference."""
    config = CONFIGS[name]
    layer, weights, bias = _made(platform, config)
    x, cotangent = rows(platform.rank, tokens, DIM), rows(50 + platform.rank, tokens, DIM)
    out, grad_x, gradients = forward_backward(platform, layer, cotangent, x)
    expected, experts, keep = reference.layer(x.astype(float), weights, config, bias)
    assert relative(out, expected) < 1e-5

    stats = layer(platform.from_host(x), with_stats=True)[1]
    chosen, dropped = platform.to_host(stats.tokens_per_expert, stats.dropped_per_expert)
    every = range(config.router.num_experts)
    assert chosen.tolist() == [int((experts == e).sum()) for e in every]
    assert dropped.tolist() == [int(((experts == e) & ~keep).sum()) for e in every]
    assert np.array_equal(platform.to_host(stats.routing.experts)[0], experts)
    if config.capacity_factor == 1.0:
        assert 0 < dropped.sum() < chosen.sum(), "the case must drop some"

    if config.router.num_experts > 8:
        return  # central differences over 32 experts take too long
    arguments = {"x": x.astype(float), **weights}
    for argument, gradient in {"x": grad_x, **gradients}.items():

        def weighted(value, argument=argument):
            moved = {**arguments, argument: value}
            return float((reference.layer(moved.pop("x"), moved, config, bias)[0] * cotangent).sum())

        wanted = reference.gradient(weighted, arguments[argument])
        if np.abs(wanted).max() > 1e-2:
            assert relative(gradient, wanted) < 2e-5, argument
        else:  # top-k of all, normalised or not: some gradients vanish
            assert np.abs(gradient).max() < 1e-5, argument


def top_1_trains_the_router(platform):
    """The gate of a layer as it is made by default gets a gradient of the size that it gets with two experts."""
    sizes = {}
    for top_k in (1, 2):
        layer = moe.MoE(platform, DIM, 4, 8, top_k)
        fill_weights(platform, layer)
        x, cotangent = rows(platform.rank, TOKENS, DIM), rows(50 + platform.rank, TOKENS, DIM)
        sizes[top_k] = np.abs(forward_backward(platform, layer, cotangent, x)[2]["router.gate"]).max()
    assert sizes[1] > 0.1 * sizes[2] > 0.01, sizes


def capacity_under_expert_parallelism(platform, name):
    """The limit is each rank's own: the sharded layer gives what the whole one gives, and computes fewer rows."""
    config = CONFIGS[name]
    layer, _, _ = _made(platform, config)
    x, cotangent = rows(platform.rank, TOKENS, DIM), rows(50 + platform.rank, TOKENS, DIM)
    expected = forward_backward(platform, layer, cotangent, x)[:2]
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    with rows_computed(platform) as computed:
        found = forward_backward(platform, layer, cotangent, x)[:2]
    for value, wanted in zip(found, expected, strict=True):
        assert relative(value, wanted) < 1e-5
    stats = layer(platform.from_host(x), with_stats=True)[1]
    chosen, dropped = platform.to_host(stats.tokens_per_expert, stats.dropped_per_expert)
    kept, all_chosen = (everywhere(platform, x) for x in (chosen.sum() - dropped.sum(), chosen.sum()))
    assert everywhere(platform, sum(computed)) == kept < all_chosen


def no_tokens(platform, name):
    """A batch without tokens goes through, forward and backward, and every gradient is zero, none absent."""
    config = CONFIGS[name]
    layer, weights, _ = _made(platform, config)
    empty = np.zeros((2, 0, DIM), np.float32)
    out, grad_x, gradients = forward_backward(platform, layer, empty, empty)
    assert out.shape == grad_x.shape == empty.shape
    assert {key: value.shape for key, value in gradients.items()} == {key: w.shape for key, w in weights.items()}
    assert not any(value.any() for value in gradients.values())
    stats = layer(platform.from_host(empty), with_stats=True)[1]
    assert stats.sequences == 2
    losses = (
        moe.load_balancing_loss(platform, stats.routing),
        moe.sequence_load_balancing_loss(platform, stats.routing, 2),
        moe.router_z_loss(platform, stats.routing),
        moe.dropped_fraction(platform, stats.tokens_per_expert, stats.dropped_per_expert),
    )
    assert [float(value) for value in platform.to_host(*losses)] == [0.0] * 4
    assert float(platform.to_host(moe.load_imbalance(platform, stats.tokens_per_expert))[0]) == 1.0


def losses_agree(platform, score_function):
    """Each auxiliary loss and its gradient with respect to the logits."""
    sequences, length = 3, 4
    router = RouterConfig(num_experts=6, top_k=2, score_function=score_function)
    logits = 2 * rows(platform.rank, sequences * length, router.num_experts)
    own_experts, _, _ = reference.route(logits.astype(float), router)
    # Counts are piecewise constant: the reference keeps those of the point and moves the scores only.

    def batch(z):
        return reference.balancing_loss(own_experts, reference.route(z, router)[2])

    def by_sequence(z):
        p = reference.route(z, router)[2]
        parts = [slice(s * length, (s + 1) * length) for s in range(sequences)]
        return float(np.mean([reference.balancing_loss(own_experts[part], p[part]) for part in parts]))

    coefficients = LossCoefficients(batch=0.5, sequence=0.25, z=0.125)
    cases = {
        "batch": (lambda routing: moe.load_balancing_loss(platform, routing), batch),
        "sequence": (lambda routing: moe.sequence_load_balancing_loss(platform, routing, sequences), by_sequence),
        "z": (lambda routing: moe.router_z_loss(platform, routing), reference.z_loss),
        "sum": (
            lambda routing: moe.auxiliary_loss(platform, routing, coefficients, sequences=sequences),
            lambda z: 0.5 * batch(z) + 0.25 * by_sequence(z) + 0.125 * reference.z_loss(z),
        ),
    }
    for name, (neutral, wanted) in cases.items():
        loss, gradient = _loss_and_gradient(platform, neutral, logits, router)
        assert abs(loss - wanted(logits.astype(float))) < 1e-5 * wanted(logits.astype(float)), name
        # A mean over tokens has small gradients; times 100 they are O(1).
        assert relative(100 * gradient, 100 * reference.gradient(wanted, logits.astype(float))) < 2e-5, name


def global_loss_agrees(platform, counts=(5, 1, 0, 3), others=1):
    """The mean of the ranks' parts, and of their gradients, is the loss of the batch of all ranks of the mesh.

    Where there are *others*, so many times the ranks form meshes of their own, whose ranks are not neighbours.
    """
    router = RouterConfig(num_experts=4, top_k=2)
    ranks = platform.world_size // others
    mesh = hyperep.init_device_mesh(platform, (ranks, others), ("dp", "ep"))["dp"]
    place, which = platform.rank // others, platform.rank % others
    stops = np.cumsum(counts[:ranks])
    everything = rows(3 + which, stops[-1], router.num_experts)
    own = slice(stops[place] - counts[place], stops[place])
    experts = reference.route(everything.astype(float), router)[0]

    def wanted(z):
        return reference.balancing_loss(experts, reference.route(z, router)[2])

    loss, gradient = _loss_and_gradient(
        platform, lambda routing: moe.global_load_balancing_loss(platform, routing, mesh), everything[own], router
    )
    # Among other losses it has a coefficient as they have.
    coefficients = LossCoefficients(global_batch=0.5, z=0.125)
    z, gradient_z = _loss_and_gradient(platform, lambda r: moe.router_z_loss(platform, r), everything[own], router)
    total, gradient_total = _loss_and_gradient(
        platform, lambda r: moe.auxiliary_loss(platform, r, coefficients, mesh=mesh), everything[own], router
    )
    assert abs(total - (0.5 * loss + 0.125 * z)) < 1e-5
    assert np.abs(gradient_total - (0.5 * gradient + 0.125 * gradient_z)).max(initial=0) < 1e-5
    mean = platform.to_host(platform.all_reduce(platform.from_host(np.array([loss])), mesh.get_group()))[0] / ranks
    assert relative(mean, np.array([wanted(everything.astype(float))])) < 1e-5
    expected = reference.gradient(wanted, everything.astype(float))
    assert np.abs(gradient / ranks - expected[own]).max(initial=0) < 1e-5 * np.abs(expected).max()


def bias_follows_the_load(platform):
    """One step of the expert bias on counts that balance on each rank's own view, and not on all ranks' together."""
    config = CONFIGS["bias"]
    layer, _, _ = _made(platform, config)
    (buffer,) = platform.buffers(layer).values()
    before = platform.to_host(platform.local(buffer))[0]
    counts = np.array([5, 1, 2, 4, 3, 3, 3, 3]) if platform.rank == 0 else np.array([0, 6, 4, 2, 3, 3, 3, 3])
    moe.update_expert_bias(platform, layer, platform.from_host(counts), 0.01)
    everyone = platform.to_host(platform.all_gather(platform.from_host(counts)))[0].reshape(-1, 8).sum(axis=0)
    after = platform.to_host(platform.local(buffer))[0]
    for e in range(8):
        step = 0.01 * np.sign(everyone.mean() - everyone[e])
        assert abs(after[e] - before[e] - step) < 1e-6, (e, everyone)
    own, common = np.sign(counts - counts.mean()), np.sign(everyone - everyone.mean())
    assert platform.world_size == 1 or not np.array_equal(own, common), "the case must tell the two apart"


def bias_follows_the_load_of_its_group(platform):
    """Of four ranks, in groups of {0, 2} and {1, 3}, each moves its bias by its own group's counts alone."""
    groups = {ranks: platform.new_group(list(ranks)) for ranks in ((0, 2), (1, 3))}
    own = (platform.rank % 2, platform.rank % 2 + 2)
    everyone = np.array([[6, 0, 3, 3], [0, 1, 4, 3], [0, 4, 1, 3], [1, 5, 0, 2]])
    layer = build_moe(platform, _config(num_experts=4, top_k=2, expert_bias=True))
    counts = platform.from_host(everyone[platform.rank])
    moe.update_expert_bias(platform, layer, counts, 0.25, group=groups[own])
    (buffer,) = platform.buffers(layer).values()
    steps = {
        ranks: -np.sign(4 * total - total.sum()) for ranks in groups for total in [everyone[list(ranks)].sum(axis=0)]
    }
    assert platform.to_host(platform.local(buffer))[0].tolist() == (0.25 * steps[own]).tolist()
    others = [-np.sign(4 * total - total.sum()) for total in (everyone.sum(axis=0), everyone[platform.rank])]
    assert not any(np.array_equal(steps[own], other) for other in others), "the case must tell them apart"
    assert not np.array_equal(*steps.values()), "the case must tell the groups apart"


def tokens_of_any_number_of_dims(platform):
    """Sequences are what the leading dims make of the tokens; the output has the shape of the input."""
    layer, _, _ = _made(platform, CONFIGS["softmax"])
    x = rows(8, 12, DIM)
    flat, _ = layer(platform.from_host(x), with_stats=True)
    (wanted,) = platform.to_host(flat)
    for shape, sequences in (((12,), 1), ((3, 4), 3), ((2, 3, 2), 6), ((1, 2, 1, 6), 2)):
        out, stats = layer(platform.from_host(x.reshape(*shape, DIM)), with_stats=True)
        assert stats.sequences == sequences, shape
        found, loss = platform.to_host(out, moe.sequence_load_balancing_loss(platform, stats.routing, stats.sequences))
        assert relative(found, wanted.reshape(*shape, DIM)) < 1e-6
        experts, probabilities = (a.reshape(sequences, 12 // sequences, -1) for a in _routed(platform, stats))
        parts = [reference.balancing_loss(e, p) for e, p in zip(experts, probabilities, strict=True)]
        assert abs(float(loss) - np.mean(parts)) < 1e-5 * np.mean(parts), shape
    (alone,) = platform.to_host(layer(platform.from_host(x[0])))
    assert relative(alone, wanted[0]) < 1e-6


def _routed(platform, stats):
    return platform.to_host(stats.routing.experts, stats.routing.probabilities)


def balance_by_bias(platform):
    """Routing a skewed batch again and again with updates of the bias evens out the load; the weights never move."""
    config = dataclasses.replace(CONFIGS["bias"], router=RouterConfig(num_experts=8, top_k=2, expert_bias=True))
    layer = build_moe(platform, config)
    fill_weights(platform, layer)
    x = platform.from_host(rows(4, 200, DIM) + 1)
    imbalances = []
    for _ in range(120):
        counts = layer(x, with_stats=True)[1].tokens_per_expert
        imbalances.append(float(platform.to_host(moe.load_imbalance(platform, counts))[0]))
        moe.update_expert_bias(platform, layer, counts, 0.01)
    assert imbalances[0] > 2
    assert np.mean(imbalances[-10:]) < 1.3, imbalances[-10:]


def _loss_and_gradient(platform, loss, logits, router):
    def function(z):
        return loss(moe.route(platform, z, router))

    value, pullback = platform.vjp(function, platform.from_host(logits))
    (gradient,) = platform.to_host(*pullback(platform.from_host(np.ones((), np.float32))))
    return float(platform.to_host(value)[0]), gradient
