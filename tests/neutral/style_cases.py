# SPDX-License-Identifier: Apache-2.0
"""What styles leave as it is, and what users may change in them. Runs on every platform."""

import copy
import warnings
import weakref

import numpy as np
import pytest
from measure import fill_weights, relative, rows

import hyperep
import hyperep.moe
from hyperep.conformance.memory import freed
from hyperep.styles.expert import ExpertParallel

EXPERTS, DIM = 4, 4


def _scaling_experts(platform):
    """Experts of a user's own: one matrix each, and a keyword argument."""
    weight = rows(5, EXPERTS, DIM, DIM)

    def forward(m, x, tokens_per_expert, *, scale=1.0):
        return scale * platform.grouped_matmul(x, m.weight, tokens_per_expert)

    return platform.make_module("Scaling", {"weight": platform.from_host(weight)}, forward), weight


def keyword_arguments_reach_the_experts(platform, style):
    """A keyword given to wrapped experts arrives, and its absence leaves the default."""
    ep, tp = (platform.world_size, 1) if style != "tp" else (1, platform.world_size)
    experts, weight = _scaling_experts(platform)
    if style == "ep":
        hyperep.ExpertParallel().apply(experts, hyperep.init_device_mesh(platform, (ep,), ("ep",)))
    else:
        shape, names = ((tp,), ("tp",)) if style == "tp" else ((ep, 1), ("ep", "tp"))
        chosen = {"tp": hyperep.TensorParallel, "etp": hyperep.ExpertTensorParallel}[style]
        mesh = hyperep.init_device_mesh(platform, shape, names)
        if style == "tp":
            # One row-parallel matrix: its input features are split, so each rank gets its own slice of the rows.
            chosen(colwise=(), rowwise=("weight",)).apply(experts, mesh)
        else:
            chosen(colwise=("weight",), rowwise=()).apply(experts, mesh)
    counts = np.array([2, 0, 3, 1])
    x = rows(platform.rank if style != "tp" else 0, 6, DIM)
    part = DIM // tp
    given = x[:, platform.rank * part : (platform.rank + 1) * part] if style == "tp" else x
    expected = np.concatenate([r @ w.T for r, w in zip(np.split(x, np.cumsum(counts)[:-1]), weight, strict=True)])
    for keywords, factor in (({}, 1.0), ({"scale": 3.0}, 3.0)):
        out = experts(platform.from_host(given), platform.from_host(counts), **keywords)
        assert relative(platform.to_host(out)[0], factor * expected) < 1e-5


class Noisy(ExpertParallel):
    """A style of a user's own: what dispatch tells combine travels in the context."""

    def _token_dispatch(self, module, inputs, mesh, num_experts):
        local_inputs, context = super()._token_dispatch(module, inputs, mesh, num_experts)
        return local_inputs, (context, len(context.tokens_per_local_expert))

    def _token_combine(self, module, routed_output, mesh, context):
        inner, experts_here = context
        return experts_here * super()._token_combine(module, routed_output, mesh, inner)


def steps_can_be_overridden(platform):
    """A subclass that changes two of the three steps, and multiplies by the number of this rank's experts."""
    experts, weight = _scaling_experts(platform)
    Noisy().apply(experts, hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",)))
    x = rows(platform.rank, EXPERTS, DIM)
    out = experts(platform.from_host(x), platform.from_host(np.ones(EXPERTS, np.int32)))
    expected = EXPERTS // platform.world_size * np.stack([r @ w.T for r, w in zip(x, weight, strict=True)])
    assert relative(platform.to_host(out)[0], expected) < 1e-5


class Watching(ExpertParallel):
    """A style that notes which module each step was given."""

    def __init__(self):
        self.seen = []

    def _token_dispatch(self, module, inputs, mesh, num_experts):
        self.seen.append(module)
        return super()._token_dispatch(module, inputs, mesh, num_experts)

    def _token_combine(self, module, routed_output, mesh, context):
        self.seen.append(module)
        return super()._token_combine(module, routed_output, mesh, context)


def a_deep_copy_hands_itself_to_the_steps(platform):
    """Steps and converters of a copy get the copy, and the original dies when nobody else holds it."""
    style = Watching()
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts = style.apply(_scaling_experts(platform)[0], mesh)
    converted = []
    hyperep.distribute_module(experts, mesh, input_fn=lambda m, inputs, mesh: converted.append(m) or inputs)
    twin = copy.deepcopy(experts)
    twin(platform.from_host(rows(platform.rank, EXPERTS, DIM)), platform.from_host(np.ones(EXPERTS, np.int32)))
    assert [m is twin for m in (*style.seen, *converted)] == [True] * 3
    original = weakref.ref(experts)
    del experts
    assert freed(original)


READY = {
    "all": (("w1", "w2", "w3"), (hyperep.Shard(0),)),
    "some": (("w2",), (hyperep.Shard(0),)),
    "in slices": (("w1", "w3"), (hyperep.Shard(0), hyperep.Shard(1))),
}


def shards_that_are_there_are_taken(platform, which):
    """Parameters that lie as the style would lay them out stay the same objects; results are those of whole ones."""
    names, placements = READY[which]
    ranks = platform.world_size
    shape, dims = ((ranks,), ("ep",)) if len(placements) == 1 else ((1, ranks), ("ep", "tp"))
    style = hyperep.ExpertParallel() if len(placements) == 1 else hyperep.ExpertTensorParallel()
    mesh = hyperep.init_device_mesh(platform, shape, dims)
    plain, experts = (hyperep.moe.GroupedExperts(platform, DIM, 8, EXPERTS, seed=3) for _ in range(2))
    for module in (plain, experts):
        fill_weights(platform, module)
    for name in names:
        hyperep.distribute_parameter(experts, name, mesh, placements)
    before = {name: platform.parameters(experts)[name] for name in names}
    style.apply(experts, mesh)
    assert all(platform.parameters(experts)[name] is held for name, held in before.items())
    data = platform.rank if len(placements) == 1 else 0
    x, counts = rows(data, 9, DIM), np.array([4 - data % 2, 2, 0, 3 + data % 2])
    inputs = [platform.from_host(x), platform.from_host(counts)]
    assert relative(*platform.to_host(experts(*inputs), plain(*inputs))) < 1e-5
    with pytest.raises(ValueError, match=r"is distributed already, .* applied once"):
        style.apply(experts, mesh)


UNUSABLE_SHARDS = {
    "another dim": [hyperep.Shard(1)] * 2,
    "replicated": [hyperep.Replicate()] * 2,
    "whole on one rank": [hyperep.Shard(0), None],
}


def other_shards_are_refused_on_every_rank(platform, which):
    """Any other layout, or one that some ranks have and others do not, before anything is changed."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts, other = (hyperep.moe.GroupedExperts(platform, DIM, 8, EXPERTS, seed=3) for _ in range(2))
    first, last = UNUSABLE_SHARDS[which]
    # Collective over the mesh, so every rank makes one, also a rank that goes on with a whole one.
    hyperep.distribute_parameter(experts, "w1", mesh, [first])
    chosen = other if last is None and platform.rank else experts
    message = r"rank 1 has 'w1', .*but rank 0 has .*laid out as" if last is None else r"'w1' is distributed already, as"
    with pytest.raises(ValueError, match=message):
        hyperep.ExpertParallel().apply(chosen, mesh)
    assert platform.sharding(platform.parameters(chosen)["w2"]) is None


def distribute_module_converts(platform):
    """``distribute_module``: partition, convert what goes in and out, and keep keywords."""
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    experts, _ = _scaling_experts(platform)
    visited = []

    def partition(path, module, mesh):
        visited.append(path)
        hyperep.distribute_parameter(module, "weight", mesh, [hyperep.Shard(0)])

    got = hyperep.distribute_module(
        experts,
        mesh,
        partition_fn=partition,
        input_fn=lambda module, inputs, mesh: (2.0 * inputs[0], inputs[1]),
        output_fn=lambda module, outputs, mesh: outputs + 1.0,
    )
    assert got is experts
    assert visited == [""]
    local = platform.local(platform.parameters(experts)["weight"])
    assert tuple(local.shape) == (EXPERTS // platform.world_size, DIM, DIM)
    x, counts = rows(1, 3, DIM), np.array([3, *[0] * (EXPERTS // platform.world_size - 1)])
    out = experts(platform.from_host(x), platform.from_host(counts), scale=5.0)
    expected = 10.0 * x @ platform.to_host(local)[0][0].T + 1.0
    assert relative(platform.to_host(out)[0], expected) < 1e-5


def shards_are_parts_of_the_first_ranks_tensor(platform):
    """Ranks that drew different weights hold parts of one tensor, in every placement; gathering gives it back."""
    from hyperep.sharding import Sharding, gather_tensor, shard_tensor

    shape = (2, platform.world_size // 2) if platform.world_size > 1 else (1, 1)
    mesh = hyperep.init_device_mesh(platform, shape, ("ep", "tp"))
    whole = rows(0, 8, 4)
    replicate, partial = hyperep.Replicate(), hyperep.Partial()
    for placements in (
        (hyperep.Shard(0), hyperep.Shard(1)),
        (hyperep.Shard(0), hyperep.Shard(0)),
        (hyperep.Shard(1), replicate),
        (replicate, replicate),
        (partial, hyperep.Shard(0)),
        (replicate, partial),
    ):
        sharding = Sharding(mesh, placements)
        local = shard_tensor(platform.from_host(rows(platform.rank, 8, 4)), sharding)
        assert tuple(local.shape) == sharding.local_shape((8, 4))
        assert sharding.global_shape(local.shape) == (8, 4)
        slices = sharding.local_slices((8, 4))
        expected = whole[slices]
        for dimension, placement in enumerate(placements):
            if placement == partial and mesh.get_local_rank(dimension):
                expected = np.zeros_like(expected)
        assert np.array_equal(platform.to_host(local)[0], expected), placements
        assert np.array_equal(platform.to_host(gather_tensor(local, sharding))[0], whole), placements


# ---------------------------------------------------------------------------------------------- buffers of experts
def _mesh_of(platform, style):
    """A style with its mesh over all ranks; tp takes two of them where both are there."""
    ranks = platform.world_size
    tp = {"ep": 1, "tp": ranks, "etp": 2 if ranks % 2 == 0 else 1}[style]
    if style == "etp":
        return hyperep.init_device_mesh(platform, (ranks // tp, tp), ("ep", "tp"))
    return hyperep.init_device_mesh(platform, (ranks,), (style,))


def _expert_of(platform, counts, count):
    """The expert of each row, int64 ``[count]``, from the counts."""
    xp = platform.xp
    return xp.searchsorted(xp.cumulative_sum(counts), platform.arange(count), side="right")


def _buffered(platform, buffers):
    """Experts that scale, shift and mask their rows by buffers with an entry for each expert; 8 x [7 -> 6 -> 7]."""
    weights = {"up": rows(60, 8, 6, 7), "down": rows(61, 8, 7, 6)}

    def forward(m, x, counts):
        experts = _expert_of(platform, counts, x.shape[0])
        scale = platform.xp.take(m.scale, experts, axis=0)  # [N]
        shift = platform.xp.take(m.shift, experts, axis=0)  # [N, 7]
        on = platform.xp.take(m.on, experts, axis=0)  # [N]
        given = x * m.temperature + platform.xp.where(on[:, None], shift, platform.xp.zeros_like(shift))
        return platform.grouped_matmul(platform.grouped_matmul(given, m.up, counts), m.down, counts) * scale[:, None]

    tensors = {name: platform.from_host(value) for name, value in weights.items()}
    return platform.make_module(
        "Buffered", tensors, forward, buffers={name: platform.from_host(value) for name, value in buffers.items()}
    )


def buffers_of_experts_are_split(platform, style):
    """What has an entry for each expert lies where the expert does; what has none stays whole."""
    buffers = {
        "scale": rows(70, 8),
        "shift": rows(71, 8, 7),
        "on": np.arange(8) % 3 != 1,
        "temperature": np.array(0.5, np.float32),
    }
    whole, sharded = (_buffered(platform, buffers) for _ in range(2))
    mesh = _mesh_of(platform, style)
    styles = {"ep": hyperep.ExpertParallel, "tp": hyperep.TensorParallel, "etp": hyperep.ExpertTensorParallel}
    settings = {} if style == "ep" else {"colwise": ("up",), "rowwise": ("down",)}
    styles[style](**settings).apply(sharded, mesh)
    line = mesh.get_local_rank("ep") if style != "tp" else 0
    counts = np.random.default_rng(line).integers(0, 3, 8)
    x = rows(80 + line, int(counts.sum()), 7)
    outputs = [platform.to_host(m(platform.from_host(x), platform.from_host(counts)))[0] for m in (whole, sharded)]
    assert relative(outputs[1], outputs[0]) < 1e-5
    found = platform.buffers(sharded)
    ep = mesh.size("ep") if style != "tp" else 1
    for name, value in buffers.items():
        local = platform.to_host(platform.local(found[name]))[0]
        of_experts = value.ndim and style != "tp"
        part = len(value) // ep if of_experts else 0
        assert np.array_equal(local, value[line * part : (line + 1) * part] if of_experts else value), name
        sharding = platform.sharding(found[name])
        layout = (hyperep.Shard(0), *[hyperep.Replicate()] * (mesh.ndim - 1))
        assert (None if sharding is None else sharding.placements) == (layout if of_experts else None), name


def buffers_that_cannot_be_decided_are_refused(platform):
    """A size that may be the experts or the features is refused with the buffer's name, until somebody says it."""
    mesh = _mesh_of(platform, "ep")

    def experts(**buffers):
        tensors = {name: platform.from_host(value) for name, value in buffers.items()}
        weight = {"w": platform.from_host(rows(1, 8, 6, 8))}
        return platform.make_module("Experts", weight, lambda m, x, counts: x, buffers=tensors)

    refused = r"cannot be seen whether buffer 'b' of shape \(.*8.*\) is split, .*; say buffers={'b': Shard\(dim\)} or"
    for shape in ((8,), (8, 3), (3, 8), (8, 8)):
        module = experts(b=rows(2, *shape))
        with pytest.raises(ValueError, match=refused):
            hyperep.ExpertParallel().apply(module, mesh)
        assert platform.sharding(platform.parameters(module)["w"]) is None, "nothing has been changed"
        for placement, dim in ((hyperep.Replicate(), None), (hyperep.Shard(shape.index(8)), shape.index(8))):
            module = experts(b=rows(2, *shape))
            hyperep.ExpertParallel(buffers={"b": placement}).apply(module, mesh)
            local = tuple(platform.local(platform.buffers(module)["b"]).shape)
            assert local == tuple(n // platform.world_size if d == dim else n for d, n in enumerate(shape))
    with pytest.raises(ValueError, match=r"buffers=\['c'\] match no buffer; the module has \['b'\]"):
        hyperep.ExpertParallel(buffers={"c": hyperep.Shard(0)}).apply(experts(b=rows(2, 3)), mesh)
    line = _mesh_of(platform, "tp")
    module = experts(b=rows(2, 6))
    with pytest.raises(ValueError, match=r"TensorParallel: .* 'b' of shape \(6,\) .* the size that tensor parallelism"):
        hyperep.TensorParallel(colwise=("w",), rowwise=()).apply(module, line)
    hyperep.TensorParallel(colwise=("w",), rowwise=(), buffers={"b": hyperep.Shard(0)}).apply(module, line)
    assert tuple(platform.local(platform.buffers(module)["b"]).shape) == (6 // platform.world_size,)


# -------------------------------------------------------------------------------------------------- fused weights
HIDDEN_OF_FUSED = 8


def _fused(platform, layout, biased=False):
    """Experts whose gate and up projections are one weight ``[E, 2 H, D]``, as many published models have them.

    Or ``[E, D, 2 H]``, with biases.
    """
    xp = platform.xp

    def linear(x, weight, bias, counts):
        if bias is None:
            return platform.grouped_matmul(x, weight, counts)
        # The bias is a product too, of a column of ones: nothing else that sorts rows has a gradient everywhere.
        one = xp.ones((x.shape[0], 1), dtype=x.dtype)
        both = platform.grouped_matmul(x, xp.permute_dims(weight, (0, 2, 1)), counts)
        return both + platform.grouped_matmul(one, xp.reshape(bias, (*bias.shape, 1)), counts)

    def forward(m, x, counts):
        both = linear(x, m.gate_up, m.gate_up_bias if biased else None, counts)  # [N, 2 H]
        if layout == "packed":
            half = both.shape[1] // 2
            gate, up = both[:, :half], both[:, half:]
        else:
            gate, up = both[:, 0::2], both[:, 1::2]
        return linear(platform.swiglu(gate, up), m.down, m.down_bias if biased else None, counts)

    shapes = {"gate_up": (4, 2 * HIDDEN_OF_FUSED, 6), "down": (4, 6, HIDDEN_OF_FUSED)}
    if biased:
        shapes = {name: (e, i, o) for name, (e, o, i) in shapes.items()}
        shapes |= {f"{name}_bias": (e, o) for name, (e, _, o) in shapes.items()}
    module = platform.make_module("Fused", {name: platform.xp.zeros(shape) for name, shape in shapes.items()}, forward)
    fill_weights(platform, module)
    return module


def fused_weights_agree_with_the_whole(platform, style, layout, biased=False):
    """Output and all gradients of fused experts that were declared; gathering a fused weight gives back the whole.

    With or without biases; with them the weights are transposed.
    """
    from hyperep.sharding import gather_tensor

    mesh = _mesh_of(platform, style)
    whole, sharded = (_fused(platform, layout, biased) for _ in range(2))
    chosen = {"tp": hyperep.TensorParallel, "etp": hyperep.ExpertTensorParallel}[style]
    colwise, rowwise = (("gate_up", "gate_up_bias"), ("down", "down_bias")) if biased else (("gate_up",), ("down",))
    fused = {layout: dict.fromkeys(colwise, 2)}
    chosen(colwise=colwise, rowwise=rowwise, transposed=biased, **fused).apply(sharded, mesh)
    lines = mesh.size("ep") if style == "etp" else 1
    line = mesh.get_local_rank("ep") if style == "etp" else 0
    counts = [np.random.default_rng(r).integers(0, 4, 4) for r in range(lines)]
    inputs = [rows(20 + r, int(c.sum()), 6) for r, c in enumerate(counts)]
    cotangents = [rows(40 + r, int(c.sum()), 6) for r, c in enumerate(counts)]

    def gradients(module, r):
        handles = platform.parameters(module)
        given = platform.from_host(counts[r])
        out, pullback = platform.vjp(
            lambda x: module(x, given), platform.from_host(inputs[r]), parameters=list(handles.values())
        )
        return (out, *pullback(platform.from_host(cotangents[r]))), handles

    expected = [platform.to_host(*gradients(whole, r)[0]) for r in range(lines)]
    (out, gradient, *weights), handles = gradients(sharded, line)
    assert relative(platform.to_host(out)[0], expected[line][0]) < 1e-5
    assert relative(platform.to_host(gradient)[0], expected[line][1]) < 1e-5
    wholes = platform.parameters(whole)
    for index, (name, handle) in enumerate(handles.items()):
        sharding = platform.sharding(handle)
        everything = platform.to_host(gather_tensor(weights[index], sharding))[0]
        assert relative(everything, sum(values[2 + index] for values in expected)) < 1e-5, name
        value, wanted = platform.to_host(gather_tensor(platform.local(handle), sharding), platform.local(wholes[name]))
        assert np.array_equal(value, wanted), name


FUSED = {
    "not declared": (
        {},
        r"'gate_up' of shape \(4, 16, 6\) gives 16 features, but the rowwise weights \('down',\) take 8; if it holds 2 "
        r"weights, say packed={'gate_up': 2} where .*, or interleaved={'gate_up': 2} where their rows take turns",
    ),
    "another number": (
        {"packed": {"gate_up": 4}},
        r"said to hold 4 weights, of 4 features each, but .* take 8; correct",
    ),
    "not colwise": (
        {"packed": {"down": 2}},
        r"'down' must be one of colwise=\('gate_up',\), and in one of the two only",
    ),
    "both": ({"packed": {"gate_up": 2}, "interleaved": {"gate_up": 2}}, "'gate_up' must be .* in one of the two only"),
    "no number": ({"packed": {"gate_up": "2"}}, "'gate_up' holds '2' weights; give a whole number, 1 or more"),
}


def fused_weights_are_declared_or_refused(platform, which):
    """What a rowwise weight takes and a colwise one gives shows that it is fused; nothing has been changed."""
    settings, message = FUSED[which]
    module = _fused(platform, "packed")
    with pytest.raises(ValueError, match=message):
        hyperep.TensorParallel(colwise=("gate_up",), rowwise=("down",), **settings).apply(
            module, _mesh_of(platform, "tp")
        )
    assert all(platform.sharding(parameter) is None for parameter in platform.parameters(module).values())


def a_packed_linear_gives_each_rank_its_part_of_each(platform):
    """``ColwiseParallel(packed=2)``: the first half of this rank's features is its part of the first weight."""
    from hyperep.moe import Linear

    mesh = _mesh_of(platform, "tp")
    linear = Linear(platform, 6, 16, bias=True)
    fill_weights(platform, linear)
    x = platform.from_host(rows(3, 5, 6))
    whole = platform.to_host(linear(x))[0].reshape(5, 2, platform.world_size, -1)
    out = platform.to_host(hyperep.ColwiseParallel(packed=2).apply(linear, mesh)(x))[0]
    assert relative(out, whole[:, :, platform.rank].reshape(5, -1)) < 1e-5
    with pytest.raises(ValueError, match=r"out=6 features .* are not divisible in each of 2 parts by the tp dimension"):
        hyperep.ColwiseParallel(packed=2).apply(Linear(platform, 6, 6), mesh)


def tensor_parallel_reaches_modules_below(platform):
    """Weights that lie in a module below the experts are split as well; left whole their sum would be too large."""
    module = _fused(platform, "packed")
    around = platform.make_module("Around", {}, lambda m, x, counts: m.inner(x, counts), children={"inner": module})
    counts, x = platform.from_host(np.array([2, 0, 3, 1])), platform.from_host(rows(9, 6, 6))
    expected = platform.to_host(around(x, counts))[0]
    hyperep.TensorParallel(colwise=("gate_up",), rowwise=("down",), packed={"gate_up": 2}).apply(
        around, _mesh_of(platform, "tp")
    )
    assert relative(platform.to_host(around(x, counts))[0], expected) < 1e-5


# ---------------------------------------------------------------------------------------------- who else knows them
def _linear(platform, seed=5):
    return platform.make_module(
        "Linear",
        {"weight": platform.from_host(rows(seed, 4, 4))},
        lambda m, x: x @ platform.xp.permute_dims(m.weight, (1, 0)),
    )


def _tied(platform):
    """A model of two parts that share one parameter."""
    first, second = _linear(platform), _linear(platform)
    held = [getattr(m, "own_parameters", None) or getattr(m, "parameters", None) for m in (first, second)]
    if isinstance(held[0], dict):  # modules that are the platform's own
        held[1]["weight"] = held[0]["weight"]
    else:
        second.weight = first.weight
    model = platform.make_module("Model", {}, lambda m, x: m.second(x), children={"first": first, "second": second})
    return model, first, second


def _weight(platform, module):
    return platform.parameters(module)["weight"]


def ties_are_kept(platform):
    """Two parts that share a parameter, and are given one layout, share its shard; a change of one is one of both."""
    mesh = _mesh_of(platform, "tp")
    model, first, second = _tied(platform)
    assert _weight(platform, first) is _weight(platform, second)
    with warnings.catch_warnings(record=platform.world_size == 1) as seen:
        hyperep.parallelize_module(model, mesh, {"*": hyperep.ColwiseParallel()})
    assert not seen
    shard = _weight(platform, first)
    assert shard is _weight(platform, second)
    assert len(platform.parameters(model)) in (1, 2)  # some platforms list a shared parameter once
    platform.assign(shard, platform.from_host(np.full((4 // platform.world_size, 4), 2.0, np.float32)))
    out = platform.to_host(second(platform.xp.ones((1, 4))))[0]
    assert out.tolist() == [[8.0] * (4 // platform.world_size)]


def ties_that_cannot_be_kept_are_refused(platform):
    """A plan that shards one of two holders changes nothing; one that lays them out in two ways is refused as well."""
    mesh = _mesh_of(platform, "tp")
    model, first, second = _tied(platform)
    with pytest.raises(ValueError, match=r"'first.weight' and 'second.weight' are one \(tied\), but the plan shards"):
        hyperep.parallelize_module(model, mesh, {"first": hyperep.ColwiseParallel()})
    assert _weight(platform, first) is _weight(platform, second)
    assert platform.sharding(_weight(platform, first)) is None
    plan = {"first": hyperep.ColwiseParallel(), "second": hyperep.RowwiseParallel()}
    with pytest.raises(ValueError, match=r"is shared with another .*laid out as .*Shard.*lay it out alike, or untie"):
        hyperep.parallelize_module(model, mesh, plan)

    class Own(hyperep.ParallelStyle):
        """A style of a user's own, of which the plan cannot know what it shards."""

        def apply(self, module, mesh):
            hyperep.distribute_parameter(module, "weight", mesh, [hyperep.Shard(0)])
            return module

    model, _, _ = _tied(platform)
    with pytest.raises(
        ValueError, match=r"'first.weight' and 'second.weight' were one \(tied\), and the styles of the"
    ):
        hyperep.parallelize_module(model, mesh, {"first": Own()})


def attributes_of_parameters_are_kept(platform):
    """What somebody has set on a parameter or buffer is there on its shard."""
    experts, _ = _scaling_experts(platform)
    _weight(platform, experts).no_weight_decay = True
    hyperep.ExpertParallel().apply(experts, _mesh_of(platform, "ep"))
    assert platform.sharding(_weight(platform, experts)) is not None
    assert _weight(platform, experts).no_weight_decay is True


def whole_parameters_that_live_on_are_told(platform):
    """One rank: whoever holds a parameter that was replaced is warned of it, and nobody else is."""
    from hyperep.styles import StaleParameters

    mesh = _mesh_of(platform, "ep")
    for holds in (False, True):
        experts, _ = _scaling_experts(platform)
        held = list(platform.parameters(experts).values()) if holds else []
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            hyperep.ExpertParallel().apply(experts, mesh)
        told = [str(w.message) for w in seen if w.category is StaleParameters]
        assert len(told) == holds
        assert not holds or (
            "'weight': shards have taken the place" in told[0] and "then make the optimizer" in told[0]
        )
        assert len(held) == holds


SEEDS = {
    "none": (lambda rank: None, None),
    "none, and a module more before on rank 1": (lambda rank: None, 1),
    "one for all": (lambda rank: 7, None),
    "one for each": (lambda rank: rank, None),
}
"""Of a layer by rank, and which rank made another one before."""
ALIKE = ("none", "one for all")


def a_style_on_a_layer_of_seeds(platform, seeds):
    """Split the experts of a layer; the router, which nobody splits, is alike on all ranks where the seeds are."""
    seed, odd = SEEDS[seeds]
    if platform.rank == odd:
        hyperep.moe.Linear(platform, 4, 4)
    layer = hyperep.moe.MoE(platform, 8, 4, 4, 2, seed=seed(platform.rank))
    hyperep.ExpertParallel().apply(platform.named_modules(layer)["experts"], _mesh_of(platform, "ep"))
    gate = platform.local(platform.parameters(layer)["router.gate"])
    own, everyone = platform.to_host(gate, platform.all_gather(platform.stop_gradient(gate)))
    assert np.array_equal(everyone, np.tile(own, (platform.world_size, 1))) == (seeds in ALIKE)


def require_told(messages, seeds, times=1):
    """Check the warnings of a split of a layer of *seeds*."""
    assert len(messages) == (0 if seeds in ALIKE else times), messages
    wanted = "ExpertParallel: rank 1 has other weights than rank 0, whose parts all ranks get now. What is not split"
    assert all(message.startswith(wanted) for message in messages)
