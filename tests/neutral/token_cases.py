# SPDX-License-Identifier: Apache-2.0
"""The exchange of tokens against a loop over tokens, choices and experts, on every rank. Runs on every platform.

Data differ between ranks, one rank has none, tokens choose an expert twice, and some choices are nobody.
"""

import functools

import numpy as np
import pytest
from measure import relative, replaced, rows

import hyperep
from hyperep.bench.counting import CountingPlatform
from hyperep.exchange.copies import choices_by_rank, plan_copies
from hyperep.exchange.token_input import HEADER
from hyperep.moe import GroupedExperts, MoEConfig, RouterConfig, build_moe
from hyperep.sharding import gather_tensor
from hyperep.workloads import Trace, choices, recorded

DIM, HIDDEN, EXPERTS, TOP_K = 6, 4, 8, 3
TOKENS = (11, 7, 0, 9)
"""Of each rank with data of its own."""

EVEN = hyperep.Balance(slots=2, max_imbalance=1.0, rows_per_copy=0)
"""Something is copied almost always."""
WAYS = {
    "tokens": ({}, ("ep",), "ep"),
    "rows": ({"exchange": "rows"}, ("ep",), "ep"),
    "levels": ({"levels": ("node", "ep")}, ("node", "ep"), "ep"),
    "etp": ({}, ("ep", "tp"), "etp"),
    "etp levels": ({"levels": ("node", "ep")}, ("node", "ep", "tp"), "etp"),
    "2 chunks": ({"chunks": 2}, ("ep",), "ep"),
    "3 chunks": ({"chunks": 3}, ("ep",), "ep"),
    "more chunks than tokens": ({"chunks": 13}, ("ep",), "ep"),
    "levels in chunks": ({"levels": ("node", "ep"), "chunks": 3}, ("node", "ep"), "ep"),
    "etp in chunks": ({"chunks": 2}, ("ep", "tp"), "etp"),
    "balanced": ({"balance": EVEN}, ("ep",), "ep"),
    "balanced levels": ({"levels": ("node", "ep"), "balance": EVEN}, ("node", "ep"), "ep"),
    "balanced levels in chunks": ({"levels": ("node", "ep"), "balance": EVEN, "chunks": 2}, ("node", "ep"), "ep"),
    "balanced etp": ({"balance": EVEN}, ("ep", "tp"), "etp"),
}
"""Settings of the style, dimensions of its mesh, and which style."""


def routing(rank, tokens=None, nobody=True):
    """Tokens, choices, weights and cotangent of one rank: duplicates, nobody, and a token that goes nowhere."""
    rng = np.random.default_rng(40 + rank)
    count = TOKENS[rank] if tokens is None else tokens
    indices = rng.integers(0, EXPERTS + nobody, size=(count, TOP_K))
    if count > 2:
        indices[0] = indices[0, 0] % EXPERTS  # one expert, three times
        indices[1] = EXPERTS if nobody else 0
    x, cotangent = rng.normal(size=(2, count, DIM))
    return x, indices, rng.uniform(0.2, 1.0, size=(count, TOP_K)), cotangent


def weights_of_experts():
    rng = np.random.default_rng(3)
    shapes = {"w1": (EXPERTS, HIDDEN, DIM), "w2": (EXPERTS, DIM, HIDDEN), "w3": (EXPERTS, HIDDEN, DIM)}
    return {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}


def loaded(name, ranks, rank):
    """As :func:`routing`, with the choices of a workload."""
    trace = recorded(64, 6)
    folded = Trace(choices=trace.choices[..., :TOP_K] % EXPERTS, experts=EXPERTS)
    sizes = {"tokens": 16, "experts": EXPERTS, "top_k": TOP_K}
    indices = choices(name, **sizes, ranks=ranks, rank=rank, step=4, trace=folded if name == "trace" else None)
    x, _, weights, cotangent = routing(rank, tokens=len(indices))
    return x, indices, weights, cotangent


def reference(x, indices, weights, cotangent):
    """Output, gradients of tokens and weights, and of the experts' weights: a loop, with the SwiGLU written out."""
    w = weights_of_experts()
    out, grad_x, grad_s = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    grads = {name: np.zeros_like(value) for name, value in w.items()}
    for t, k in np.argwhere(indices < EXPERTS):
        e, s, g = indices[t, k], weights[t, k], cotangent[t]
        z, u = w["w1"][e] @ x[t], w["w3"][e] @ x[t]
        sigmoid = 1 / (1 + np.exp(-z))
        hidden = z * sigmoid * u
        y = w["w2"][e] @ hidden
        out[t] += s * y
        grad_s[t, k] = g @ y
        grad_hidden = s * (w["w2"][e].T @ g)
        grads["w2"][e] += s * np.outer(g, hidden)
        grad_z = grad_hidden * u * sigmoid * (1 + z * (1 - sigmoid))
        grad_u = grad_hidden * z * sigmoid
        grads["w1"][e] += np.outer(grad_z, x[t])
        grads["w3"][e] += np.outer(grad_u, x[t])
        grad_x[t] += w["w1"][e].T @ grad_z + w["w3"][e].T @ grad_u
    return out, grad_x, grad_s, grads


def dtype_and_tolerance(platform):
    has_float64 = platform.capabilities.get(hyperep_capability("FLOAT64")) == hyperep_support("FULL")
    return (np.float64, 1e-12) if has_float64 else (np.float32, 2e-5)


def hyperep_capability(name):
    from hyperep.platform.capabilities import Capability

    return Capability[name]


def hyperep_support(name):
    from hyperep.platform.capabilities import Support

    return Support[name]


def make_experts(platform, kind, dtype):
    """Experts of both calls, or of one of them: a module as somebody else would write it."""
    values = {name: platform.from_host(value.astype(dtype)) for name, value in weights_of_experts().items()}

    def of_rows(m, rows, counts):
        return platform.grouped_swiglu(rows, m.w1, m.w2, m.w3, counts)

    def of_tokens(m, tokens, indices, weights):
        from hyperep.exchange.routed import routed_from_rows

        return routed_from_rows(platform, functools.partial(of_rows, m), m.w1.shape[0])(tokens, indices, weights)

    if kind == "both":
        experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
        for name, parameter in platform.parameters(experts).items():
            if dtype == np.float32:
                platform.assign(parameter, values[name])
        if dtype == np.float32:
            return experts

        def of_both(m, x, *routing, rows=None):
            if len(routing) == 1:
                return of_rows(m, x, *routing)
            return of_tokens(m, x, *routing)

        module = platform.make_module("BothExperts", values, of_both)
        module.takes = ("tokens", "rows")
        return module
    module = platform.make_module("TheirExperts", values, of_tokens if kind == "tokens" else of_rows)
    if kind == "tokens":
        module.takes = "tokens"
    return module


def agrees(platform, way, shape, kind="both", transposed=False, workload=None):
    """Output and every gradient of routed experts, sharded one way, on a mesh of *shape*; perhaps under a workload."""
    settings, names, style = WAYS[way]
    dtype, tolerance = dtype_and_tolerance(platform)
    mesh = hyperep.init_device_mesh(platform, shape, names)
    split = [name for name in names if name != "tp"]
    sources = int(np.prod([mesh.size(name) for name in split]))
    own = int(np.ravel_multi_index([mesh.get_local_rank(name) for name in split], [mesh.size(name) for name in split]))
    everyone = [loaded(workload, sources, source) if workload else routing(source) for source in range(sources)]
    wanted = [reference(*data) for data in everyone]
    experts = make_experts(platform, kind, dtype)
    styles = {"ep": hyperep.ExpertParallel, "etp": hyperep.ExpertTensorParallel}
    styles[style](**settings).apply(experts, mesh)

    x, indices, weights, cotangent = everyone[own]
    handles = platform.parameters(experts)
    numbers = platform.from_host(indices)
    if transposed:
        numbers = platform.xp.permute_dims(platform.from_host(np.ascontiguousarray(indices.T)), (1, 0))

    def function(x, s):
        if transposed:
            x, s = platform.xp.permute_dims(x, (1, 0)), platform.xp.permute_dims(s, (1, 0))
        return experts(x, numbers, s)

    primals = [np.ascontiguousarray(v.T if transposed else v).astype(dtype) for v in (x, weights)]
    out, pullback = platform.vjp(function, *map(platform.from_host, primals), parameters=list(handles.values()))
    grad_x, grad_s, *grads = pullback(platform.from_host(cotangent.astype(dtype)))
    host = platform.to_host(out, grad_x, grad_s)
    found = dict(zip(("output", "tokens", "weights"), host, strict=True))
    if transposed:
        found["tokens"], found["weights"] = found["tokens"].T, found["weights"].T
    expected = dict(zip(found, wanted[own][:3], strict=True))
    for (name, parameter), gradient in zip(handles.items(), grads, strict=True):
        found[name] = platform.to_host(gather_tensor(gradient, platform.sharding(parameter)))[0]
        expected[name] = sum(w[3][name] for w in wanted)
    worst = {name: relative(found[name], expected[name]) for name in found}
    assert max(worst.values()) < tolerance, worst


def plan_is_that_of_the_loop(platform):
    """Which copies are sent, against a loop over ranks and tokens."""
    for ranks, tokens in ((1, 5), (2, 9), (4, 13), (8, 6), (2, 0)):
        rng = np.random.default_rng(ranks + tokens)
        local = EXPERTS // ranks
        indices = rng.integers(0, EXPERTS + 1, size=(tokens, TOP_K))
        owner = indices // local
        by_rank = choices_by_rank(platform, platform.from_host(indices), ranks, local)
        counted_here = np.array([(owner == r).sum(axis=1) for r in range(ranks)]).reshape(ranks, tokens)
        np.testing.assert_array_equal(platform.to_host(by_rank)[0], counted_here)
        pairs = [(r, t) for r in range(ranks) for t in range(tokens) if r in owner[t]]
        splits = tuple(sum(p[0] == r for p in pairs) for r in range(ranks))
        copies = plan_copies(platform, by_rank, splits)
        token, index, entry = platform.to_host(copies.token, copies.index, copies.entry)
        assert token.tolist() == [t for _, t in pairs]
        assert entry.tolist() == [t * ranks + r for r, t in pairs]
        for t in range(tokens):
            for r in range(ranks):
                if (r, t) in pairs:
                    assert index[t, r] == pairs.index((r, t))
                else:
                    assert index[t, r] >= len(pairs)


def costs(platform, way, shape):
    """Host copies and exchanges of a layer, forward and backward: one copy a level, none in backward.

    In chunks the first level has one copy for all of them; each level below has one for each chunk that reaches it.
    """
    settings, names, _ = WAYS[way]
    counting = CountingPlatform(platform)
    mesh = hyperep.init_device_mesh(counting, shape, names)
    experts = GroupedExperts(counting, DIM, HIDDEN, EXPERTS)
    hyperep.ExpertParallel(**settings).apply(experts, mesh)
    x, indices, weights, cotangent = routing(platform.rank, tokens=6)
    x, weights, cotangent = (platform.from_host(v.astype(np.float32)) for v in (x, weights, cotangent))
    numbers = platform.from_host(indices)
    levels, chunks = len(names), settings.get("chunks", 1)
    calls = 1 + chunks * (levels - 1)
    counting.take()
    _, pullback = platform.vjp(lambda x, s: experts(x, numbers, s), x, weights)
    forward = counting.take()
    pullback(cotangent)
    backward = counting.take()
    assert (forward.host_copies, forward.small, forward.large) == (calls, calls, 3 * levels * chunks), forward
    assert (backward.host_copies, backward.small, backward.large) == (0, 0, 3 * levels * chunks), backward


def bytes_on_the_wire(platform, way, shape):
    """Rows that are sent are the pairs of a token and a rank that owns one of its experts, at each level; once each."""
    settings, names, _ = WAYS[way]
    mesh = hyperep.init_device_mesh(platform, shape, names)
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    hyperep.ExpertParallel(**settings).apply(experts, mesh)
    x, indices, weights, _ = routing(platform.rank, tokens=20)
    sent = []
    original = platform.all_to_all_single

    def noting(x, output_splits=None, input_splits=None, group=None, async_op=False):
        sent.append((tuple(x.shape), None if input_splits is None else tuple(input_splits)))
        return original(x, output_splits, input_splits, group, async_op)

    with replaced(platform, all_to_all_single=noting):
        experts(*(platform.from_host(v) for v in (x.astype(np.float32), indices, weights.astype(np.float32))))
    outer = mesh.shape[0]
    owners = indices // (EXPERTS // outer)
    pairs = tuple(int(sum(r in owners[t] for t in range(len(x)))) for r in range(outer))
    assert sent[0] == ((outer, HEADER), None)
    assert sent[1] == ((sum(pairs), 2 * TOP_K), pairs)
    assert sent[2] == ((sum(pairs), DIM), pairs)


def limited_groups_bound_the_copies(platform, nodes, top_groups):
    """DeepSeek-V3's routing with a group of experts for each node: no token crosses to more nodes than groups."""
    mesh = hyperep.init_device_mesh(platform, (nodes, platform.world_size // nodes), ("node", "ep"))
    tokens = platform.from_host(rows(60 + platform.rank, 24, DIM))

    def crossing(top_groups):
        router = RouterConfig(num_experts=EXPERTS, top_k=4, num_groups=nodes, top_groups=top_groups)
        layer = build_moe(platform, MoEConfig(dim=DIM, hidden_dim=HIDDEN, router=router), seed=5)
        hyperep.parallelize_module(layer, mesh, {"experts": hyperep.ExpertParallel(levels=("node", "ep"))})
        sent = []
        original = platform.all_to_all_single

        def noting(x, output_splits=None, input_splits=None, group=None, async_op=False):
            if input_splits is not None and group is mesh.get_group("node") and x.shape[1] == DIM:
                sent.append(sum(input_splits))
            return original(x, output_splits, input_splits, group, async_op)

        with replaced(platform, all_to_all_single=noting):
            layer(tokens)
        # The tokens on their way out, and the sums of those that others sent, on their way back.
        assert len(sent) == 2
        return sent[0]

    assert crossing(top_groups) == 24 * top_groups
    assert crossing(nodes) > 24 * top_groups


BAD = {
    "too large": (f"indices hold {EXPERTS + 1}", lambda x, i, s: (x, np.where(i == i.flat[0], EXPERTS + 1, i), s)),
    "negative": ("indices hold -1", lambda x, i, s: (x, np.where(i == i.flat[0], -1, i), s)),
    "floating indices": ("int32 or int64", lambda x, i, s: (x, i.astype(np.float32), s)),
    "integer weights": ("floating", lambda x, i, s: (x, i, np.ones_like(i))),
    "another number of choices": ("with 2 weights", lambda x, i, s: (x, i[:, :2].copy(), s[:, :2].copy())),
    "weights of another shape": ("weights must be", lambda x, i, s: (x, i, s[:, :2].copy())),
    "fewer choices than tokens": ("indices must be", lambda x, i, s: (x, i[:-1].copy(), s[:-1].copy())),
    "wider tokens": ("7 x float32", lambda x, i, s: (np.zeros((len(x), DIM + 1), x.dtype), i, s)),
    "tokens of three dims": ("tokens have 3 dims", lambda x, i, s: (x[None], i, s)),
}


def bad_input_is_an_error_on_every_rank(platform, what, at, chunks=1):
    """What one rank does wrong every rank tells, in the same words but for what only it can know."""
    message, spoil = BAD[what]
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    hyperep.ExpertParallel(chunks=chunks).apply(experts, mesh)
    x, indices, weights, _ = routing(0, tokens=5)
    data = x.astype(np.float32), indices, weights.astype(np.float32)
    if platform.rank == at:
        data = spoil(*data)
    with pytest.raises((ValueError, TypeError), match=message) as told:
        experts(*map(platform.from_host, data))
    assert f"on rank {at}" in str(told.value), told.value
    # The world is in step: what follows works.
    good = [platform.from_host(v) for v in (x.astype(np.float32), indices, weights.astype(np.float32))]
    assert tuple(experts(*good).shape) == (5, DIM)


def same_bits_again(platform, chunks=1):
    """The same input gives the same bits, forward and backward, whatever ran in between."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    hyperep.ExpertParallel(chunks=chunks).apply(experts, mesh)

    def once(tokens):
        x, indices, weights, cotangent = routing(platform.rank, tokens=tokens)
        numbers = platform.from_host(indices)
        x, weights, cotangent = (platform.from_host(v.astype(np.float32)) for v in (x, weights, cotangent))
        handles = list(platform.parameters(experts).values())
        out, pullback = platform.vjp(lambda x, s: experts(x, numbers, s), x, weights, parameters=handles)
        return platform.to_host(out, *pullback(cotangent))

    first = once(40)
    once(17)
    for one, other in zip(first, once(40), strict=True):
        np.testing.assert_array_equal(one, other)


class Noting(hyperep.ExpertParallel):
    """A style with a step of its own, as for the exchange of rows."""

    def __init__(self):
        self.steps = []

    def _token_dispatch(self, module, inputs, mesh, num_experts):
        self.steps.append("dispatch")
        return super()._token_dispatch(module, inputs, mesh, num_experts)


def steps_of_a_subclass_see_every_call(platform):
    """Whoever changes how rows travel is asked for tokens too, which become rows."""
    style = Noting()
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = GroupedExperts(platform, DIM, HIDDEN, EXPERTS)
    style.apply(experts, mesh)
    x, indices, weights, _ = routing(platform.rank, tokens=5)
    experts(*(platform.from_host(v) for v in (x.astype(np.float32), indices, weights.astype(np.float32))))
    assert style.steps == ["dispatch"]
