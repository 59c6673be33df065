# SPDX-License-Identifier: Apache-2.0
"""A batch that is filled up with padding against its real tokens alone. Runs on every platform."""

import dataclasses

import numpy as np
from measure import everywhere, fill_weights, forward_backward, relative, rows, rows_computed
from moe_cases import CONFIGS, DIM

import hyperep
from hyperep import moe
from hyperep.moe import LossCoefficients, build_moe

MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
"""Four sequences: full, padded on both sides, nothing but padding, padded in the middle."""
NAMES = ["softmax", "groups and bias", "shared", "capacity by probability", "capacity by position"]


def _mask(platform, *, empty_rank=None):
    return np.zeros_like(MASK) if platform.rank == empty_rank else np.roll(MASK, platform.rank, axis=0)


def _padded(platform, mask):
    """Tokens whose padding is not even a number, a cotangent that is zero there, and the same without padding."""
    x, cotangent = rows(platform.rank, *mask.shape, DIM), rows(50 + platform.rank, *mask.shape, DIM)
    real = x[mask], cotangent[mask]
    x[~mask] = np.nan
    cotangent[~mask] = 0
    return (x, cotangent), real


def _masked(platform, layer, mask):
    """The layer as a function of tokens alone, which is told the mask."""
    bound = platform.from_host(mask)
    return lambda x, **kwargs: layer(x, mask=bound, **kwargs)


def _forward_backward(platform, layer, function, x, cotangent):
    """Output and gradient of ``x``, and gradients of the layer's parameters by path."""
    handles = platform.parameters(layer)
    out, pullback = platform.vjp(function, platform.from_host(x), parameters=list(handles.values()))
    grad_x, *gradients = platform.to_host(*pullback(platform.from_host(cotangent)))
    return platform.to_host(out)[0], grad_x, dict(zip(handles, gradients, strict=True))


def padding_goes_to_nobody(platform, name, sharded=False):
    """Output, gradients, counts and rows sent are those of the real tokens alone, though padding holds NaN."""
    layer = build_moe(platform, CONFIGS[name])
    fill_weights(platform, layer)
    for buffer in platform.buffers(layer).values():
        platform.assign(buffer, platform.from_host(0.3 * rows(99, *buffer.shape)))
    if sharded:
        mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
        hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    mask = _mask(platform, empty_rank=1)
    (x, cotangent), (real_x, real_cotangent) = _padded(platform, mask)
    wanted_out, wanted_grad, wanted = forward_backward(platform, layer, real_cotangent, real_x)
    wanted_stats = layer(platform.from_host(real_x), with_stats=True)[1]

    function = _masked(platform, layer, mask)
    out, grad_x, gradients = _forward_backward(platform, layer, function, x, cotangent)
    assert not out[~mask].any()
    assert not grad_x[~mask].any()
    assert relative(out[mask], wanted_out) < 1e-5
    assert relative(grad_x[mask], wanted_grad) < 1e-5
    assert gradients.keys() == wanted.keys()
    for path, gradient in gradients.items():
        if np.abs(wanted[path]).max() > 1e-2:
            assert relative(gradient, wanted[path]) < 1e-5, path
        else:  # no token met the expert
            assert np.abs(gradient - wanted[path]).max() < 1e-6, path

    stats = function(platform.from_host(x), with_stats=True)[1]
    assert stats.sequences == len(mask)
    for field in ("tokens_per_expert", "dropped_per_expert"):
        found, right = platform.to_host(getattr(stats, field), getattr(wanted_stats, field))
        assert found.tolist() == right.tolist(), field
    experts, scores = platform.to_host(stats.routing.experts, stats.routing.scores)
    flat = mask.reshape(-1)
    assert (experts[~flat] == CONFIGS[name].router.num_experts).all()
    assert not scores[~flat].any()
    assert np.array_equal(experts[flat], platform.to_host(wanted_stats.routing.experts)[0])


def padding_is_not_sent(platform, name):
    """Experts compute the rows of real tokens, and not one more."""
    config = CONFIGS[name]
    layer = build_moe(platform, config)
    fill_weights(platform, layer)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    mask = _mask(platform)
    (x, _), _ = _padded(platform, mask)
    with rows_computed(platform) as computed:
        stats = _masked(platform, layer, mask)(platform.from_host(x), with_stats=True)[1]
    chosen, dropped = platform.to_host(stats.tokens_per_expert, stats.dropped_per_expert)
    assert chosen.sum() == mask.sum() * config.router.top_k
    assert everywhere(platform, sum(computed)) == everywhere(platform, chosen.sum() - dropped.sum())


def padding_costs_nothing(platform, score_function):
    """Each of the four losses, and its gradient of the gate, is that of the real tokens alone."""
    name = {"softmax": "softmax", "sigmoid": "sigmoid"}[score_function]
    layer = build_moe(platform, CONFIGS[name])
    fill_weights(platform, layer)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("dp",))
    gate = platform.parameters(layer)["router.gate"]
    mask = _mask(platform)
    (x, _), (real, _) = _padded(platform, mask)
    one = platform.from_host(np.ones((), np.float32))

    def loss_and_gradient(routed, loss):
        value, pullback = platform.vjp(lambda: loss(routed()), parameters=[gate])
        return [np.asarray(result, np.float64) for result in platform.to_host(value, *pullback(one))]

    def with_padding():
        return _masked(platform, layer, mask)(platform.from_host(x), with_stats=True)[1].routing

    def of(tokens):
        return lambda: layer(platform.from_host(tokens), with_stats=True)[1].routing

    def agree(found, wanted, what):
        assert abs(found[0] - wanted[0]) < 1e-5 * wanted[0], what
        assert relative(100 * found[1], 100 * wanted[1]) < 2e-5, what

    whole = {
        "batch": lambda routing: moe.load_balancing_loss(platform, routing),
        "global": lambda routing: moe.global_load_balancing_loss(platform, routing, mesh),
        "z": lambda routing: moe.router_z_loss(platform, routing),
    }
    for what, loss in whole.items():
        agree(loss_and_gradient(with_padding, loss), loss_and_gradient(of(real), loss), what)

    sequences = [loss_and_gradient(of(x[s][mask[s]]), whole["batch"]) for s in range(len(mask)) if mask[s].any()]
    wanted = [sum(part) / len(sequences) for part in zip(*sequences, strict=True)]
    found = loss_and_gradient(
        with_padding, lambda routing: moe.sequence_load_balancing_loss(platform, routing, len(mask))
    )
    agree(found, wanted, "sequence")


def nothing_but_padding(platform, name):
    """Zero everywhere and NaN nowhere: output, every gradient, every loss, the load; the bias stays as it is."""
    config = CONFIGS[name]
    layer = build_moe(platform, config)
    fill_weights(platform, layer)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("dp",))
    handles = platform.parameters(layer)
    mask = np.zeros((2, 3), bool)
    x = platform.from_host(np.full((2, 3, DIM), np.nan, np.float32))
    coefficients = LossCoefficients(batch=1.0, sequence=1.0, global_batch=1.0, z=1.0)

    def function(x):
        out, stats = _masked(platform, layer, mask)(x, with_stats=True)
        return out, moe.auxiliary_loss(platform, stats.routing, coefficients, sequences=stats.sequences, mesh=mesh)

    (out, loss), pullback = platform.vjp(function, x, parameters=list(handles.values()))
    cotangents = np.ones((2, 3, DIM), np.float32), np.ones((), np.float32)
    gradients = platform.to_host(*pullback(*(platform.from_host(g) for g in cotangents)))
    assert not any(value.any() for value in (*platform.to_host(out, loss), *gradients))
    stats = _masked(platform, layer, mask)(x, with_stats=True)[1]
    assert not platform.to_host(stats.tokens_per_expert)[0].any()
    assert float(platform.to_host(moe.load_imbalance(platform, stats.tokens_per_expert))[0]) == 1.0
    for buffer in platform.buffers(layer).values():
        moe.update_expert_bias(platform, layer, stats.tokens_per_expert, 0.1)
        assert not platform.to_host(platform.local(buffer))[0].any()


def bias_is_moved_by_real_tokens(platform):
    """Padding that would turn the load over leaves the bias to the real tokens."""
    config = dataclasses.replace(CONFIGS["bias"], router=dataclasses.replace(CONFIGS["bias"].router, top_k=2))
    mask = np.array([1] * 3 + [0] * 12, bool)
    x = rows(7, *mask.shape, DIM)
    biases = []
    for tokens, kwargs in ((x[mask], {}), (x, {"mask": platform.from_host(mask)}), (x, {})):
        layer = build_moe(platform, config)
        fill_weights(platform, layer)
        stats = layer(platform.from_host(tokens), with_stats=True, **kwargs)[1]
        moe.update_expert_bias(platform, layer, stats.tokens_per_expert, 0.5)
        biases.append(platform.to_host(*map(platform.local, platform.buffers(layer).values()))[0].tolist())
    real, masked, everything = biases
    assert masked == real
    assert everything != real, "the case must tell them apart"
