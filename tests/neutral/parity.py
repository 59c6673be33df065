# SPDX-License-Identifier: Apache-2.0
"""Each style against the unsharded layer, on every rank: outputs and every gradient. Runs on every platform."""

import numpy as np
from measure import fill_weights, forward_backward, relative, replaced, rows

import hyperep
from hyperep.moe import PRESETS, GroupedExperts, Linear, MoE, MoEConfig, RouterConfig, build_moe
from hyperep.sharding import gather_tensor

DIM, HIDDEN, EXPERTS, TOP_K = 8, 12, 8, 2
GRID = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]
"""(ep, tp)"""
IN_CHUNKS = [(*of, chunks) for of in (("ep", 2, 1), ("ep", 4, 1), ("etp", 2, 2)) for chunks in (1, 2, 3)]
"""(style, ep, tp, chunks)"""
TOKENS = (10, 3, 0, 7)
"""Of each data rank; the third one has none."""


def make_style(platform, style, ep, tp, **options):
    """A style and the mesh for it."""
    shape, names = {"ep": ((ep,), ("ep",)), "tp": ((tp,), ("tp",)), "etp": ((ep, tp), ("ep", "tp"))}[style]
    classes = {"ep": hyperep.ExpertParallel, "tp": hyperep.TensorParallel, "etp": hyperep.ExpertTensorParallel}
    return classes[style](**options), hyperep.init_device_mesh(platform, shape, names)


CONFIGS = {
    "plain": MoEConfig(dim=DIM, hidden_dim=HIDDEN, router=RouterConfig(num_experts=EXPERTS, top_k=TOP_K)),
    **{
        name: PRESETS[name].config.scaled_down(dim=DIM, hidden_dim=HIDDEN, num_experts=32)
        for name in ("deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")
    },
}
PLAN = {
    "experts": hyperep.ExpertTensorParallel(),
    "shared_*.w[13]": hyperep.ColwiseParallel(),
    "shared_*.w2": hyperep.RowwiseParallel(),
}


def errors(platform, style, ep, tp, config="plain", exchange="tokens", chunks=1):
    """Relative errors of a sharded MoE layer, by what was compared.

    Data differ between ``ep`` ranks and are replicated over ``tp``. Each rank computes the reference by itself: the
    unsharded layer on the data of all ranks.
    """
    options = {"output_layout": hyperep.Partial()} if style == "partial" else {}
    if style != "tp":
        options |= {"exchange": exchange, "chunks": chunks}
    applied, mesh = make_style(platform, "etp" if style in ("plan", "partial") else style, ep, tp, **options)
    data_rank = mesh.get_local_rank("ep") if "ep" in mesh.mesh_dim_names else 0
    stops = np.cumsum(TOKENS[:ep])
    own = slice(stops[data_rank] - TOKENS[data_rank], stops[data_rank])
    x, cotangent = rows(1, stops[-1], DIM), rows(2, stops[-1], DIM)

    layer = build_moe(platform, CONFIGS[config])
    fill_weights(platform, layer)
    for buffer in platform.buffers(layer).values():
        platform.assign(buffer, platform.from_host(0.3 * rows(3, CONFIGS[config].router.num_experts)))
    expected = forward_backward(platform, layer, cotangent, x)

    if style == "plan":
        hyperep.parallelize_module(layer, mesh, {**PLAN, "experts": hyperep.ExpertTensorParallel(exchange=exchange)})
    else:
        applied.apply(platform.named_modules(layer)["experts"], mesh)
    if style == "partial":
        group = mesh.get_group("tp")
        platform.wrap_forward(layer, lambda inner, x: platform.reduce_from_group(inner(x), group))
    out, grad_x, gradients = forward_backward(platform, layer, cotangent[own], x[own])
    found = {"output": relative(out, expected[0][own]), "input gradient": relative(grad_x, expected[1][own])}
    for name, parameter in platform.parameters(layer).items():
        gradient, sharding = platform.from_host(gradients[name]), platform.sharding(parameter)
        if sharding is not None:
            gradient = gather_tensor(gradient, sharding)
        if "ep" in mesh.mesh_dim_names and (sharding is None or "ep" not in sharding.mesh.mesh_dim_names):
            # Data parallel over ep: this rank's tokens only. Replicated over tp: nothing to sum.
            gradient = platform.all_reduce(gradient, mesh.get_group("ep"))
        found[name] = relative(platform.to_host(gradient)[0], expected[2][name])
    return found


def sharded_layer_agrees(platform, style, ep, tp, exchange="tokens", chunks=1):
    """Output, input gradient, and every parameter's gradient, router and experts."""
    found = errors(platform, style, ep, tp, exchange=exchange, chunks=chunks)
    assert set(found) == {"output", "input gradient", "router.gate", "experts.w1", "experts.w2", "experts.w3"}
    assert max(found.values()) < 1e-5, found


def configured_layer_agrees(platform, style, ep, tp, config, chunks=1):
    """The same for the routing and the shared experts of published models, which chunks compute meanwhile."""
    found = errors(platform, style, ep, tp, config, chunks=chunks)
    assert ("shared_experts.w2.weight" in found) == (config == "deepseek-v3")
    assert max(found.values()) < 1e-5, found


def linear_pair_agrees(platform, bias):
    """Column-wise, then row-wise, on inputs of three dims: output, input gradient, weights and biases."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("tp",))
    x, cotangent = rows(1, 3, 4, DIM), rows(2, 3, 4, DIM)
    first, second = Linear(platform, DIM, HIDDEN, bias=bias), Linear(platform, HIDDEN, DIM, bias=bias)
    pair = platform.make_module(
        "Pair", {}, lambda m, x: m.second(platform.xp.tanh(m.first(x))), children={"first": first, "second": second}
    )
    fill_weights(platform, pair)
    expected = forward_backward(platform, pair, cotangent, x)
    plan = {"first": hyperep.ColwiseParallel(), "second": hyperep.RowwiseParallel()}
    hyperep.parallelize_module(pair, mesh, plan)
    out, grad_x, gradients = forward_backward(platform, pair, cotangent, x)
    assert relative(out, expected[0]) < 1e-5
    assert relative(grad_x, expected[1]) < 1e-5
    parameters = platform.parameters(pair)
    assert len(parameters) == (4 if bias else 2)
    for name, parameter in parameters.items():
        whole = gather_tensor(platform.from_host(gradients[name]), platform.sharding(parameter))
        assert relative(platform.to_host(whole)[0], expected[2][name]) < 1e-5, name


def partial_rowwise_output_sums_to_the_whole(platform):
    """``RowwiseParallel(output_layout=Partial())`` leaves the sum to the caller."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("tp",))
    x = rows(1, 4, HIDDEN)
    linear = Linear(platform, HIDDEN, DIM, seed=0)
    expected = platform.to_host(linear(platform.from_host(x)))[0]
    hyperep.RowwiseParallel(output_layout=hyperep.Partial()).apply(linear, mesh)
    part = HIDDEN // platform.world_size
    term = linear(platform.from_host(x[:, platform.rank * part : (platform.rank + 1) * part]))
    assert relative(platform.to_host(term)[0], expected) > 1e-2
    assert relative(platform.to_host(platform.all_reduce(term))[0], expected) < 1e-5


def backward_reduction_is_needed(platform, style, ep, tp):
    """Without the all-reduce of the input gradient the forward stays right, and all that lies below goes wrong."""
    with replaced(platform, copy_to_group=lambda x, group=None: x):
        found = errors(platform, style, ep, tp)
    assert found["output"] < 1e-5, found
    wrong = found["input gradient"] > 1e-2
    # The data rank without tokens has no gradient that could be wrong.
    assert wrong or TOKENS[platform.rank // tp] == 0, found
    assert found["router.gate"] > 1e-2, found


def forward_reduction_is_needed(platform, style, ep, tp):
    """Without the all-reduce of the row-parallel product the output is one slice's term."""
    with replaced(platform, reduce_from_group=lambda x, group=None: x):
        found = errors(platform, style, ep, tp)
    assert found["output"] > 1e-2 or TOKENS[platform.rank // tp] == 0, found


def partial_output_sums_to_the_whole(platform, style, ep, tp):
    """``output_layout=Partial()``: the caller reduces, or reduce-scatters, and gets what ``Replicate()`` would give."""
    applied, mesh = make_style(platform, style, ep, tp, output_layout=hyperep.Partial())
    group = mesh.get_group("tp")
    data_rank = mesh.get_local_rank("ep") if "ep" in mesh.mesh_dim_names else 0
    counts = np.array([0, 3, 1, 2, 0, 2, 3, 1]) if data_rank == 0 else np.array([4, 0, 0, 4, 1, 1, 1, 1])
    x, cotangent = rows(10 + data_rank, 12, DIM), rows(20 + data_rank, 12, DIM)
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    fill_weights(platform, experts)
    expected, expected_grad, _ = forward_backward(platform, experts, cotangent, x, counts)

    applied.apply(experts, mesh)
    out, grad, _ = forward_backward(platform, experts, cotangent, x, counts)
    assert relative(out, expected) > 1e-2, "the output is reduced already"
    assert relative(grad, expected_grad) < 1e-5
    partial = platform.from_host(out)
    assert relative(platform.to_host(platform.all_reduce(partial, group))[0], expected) < 1e-5
    scattered = platform.to_host(platform.reduce_scatter(partial, group))[0]
    here = mesh.get_local_rank("tp") * len(scattered)
    assert relative(scattered, expected[here : here + len(scattered)]) < 1e-5


def gradient_scale(platform, mean_of_means):
    """Both ways to scale, as the docs state them, give the gradients of the mean over the tokens of all ranks."""
    tokens, ranks = 6, platform.world_size
    mesh = hyperep.init_device_mesh(platform, (ranks,), ("ep",))
    layer = MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K)
    fill_weights(platform, layer)
    x, target = rows(1, ranks * tokens, DIM), rows(2, ranks * tokens, DIM)

    def gradients(x, target, denominator):
        handles = platform.parameters(layer)

        def loss(x):
            error = layer(x) - platform.from_host(target)
            return platform.xp.sum(error * error) / denominator

        _, pullback = platform.vjp(loss, platform.from_host(x), parameters=list(handles.values()))
        return dict(zip(handles, pullback(platform.from_host(np.ones((), np.float32)))[1:], strict=True))

    everything = gradients(x, target, float(ranks * tokens))
    wanted = dict(zip(everything, platform.to_host(*everything.values()), strict=True))
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], mesh)
    own = slice(platform.rank * tokens, (platform.rank + 1) * tokens)
    found = gradients(x[own], target[own], float(tokens if mean_of_means else ranks * tokens))
    for name, parameter in platform.parameters(layer).items():
        sharding = platform.sharding(parameter)
        if sharding is None:  # what data parallelism does with replicated parameters: an average, or a sum
            gradient = platform.all_reduce(found[name]) * (1.0 / ranks if mean_of_means else 1.0)
        else:
            gradient = gather_tensor(found[name] * (1.0 / ranks if mean_of_means else 1.0), sharding)
        assert relative(platform.to_host(gradient)[0], wanted[name]) < 1e-5, name


def one_style_serves_two_layers(platform):
    """Two layers, one style object: interleaved they agree with the unsharded pair, and the object stays as it was."""
    style = hyperep.ExpertParallel()
    settings = dict(vars(style))
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    layers = [MoE(platform, DIM, HIDDEN, EXPERTS, TOP_K) for _ in range(2)]
    for seed, layer in enumerate(layers):
        fill_weights(platform, layer, seed)
    x, cotangent = rows(platform.rank, 9, DIM), rows(30 + platform.rank, 9, DIM)

    def both(x):
        return layers[1](layers[0](x)) + layers[0](x)

    def run():
        out, pullback = platform.vjp(both, platform.from_host(x))
        return platform.to_host(out, *pullback(platform.from_host(cotangent)))

    expected = run()
    for layer in layers:
        assert style.apply(platform.named_modules(layer)["experts"], mesh) is platform.named_modules(layer)["experts"]
    for value, reference in zip(run(), expected, strict=True):
        assert relative(value, reference) < 1e-5
    assert vars(style) == settings
