# SPDX-License-Identifier: Apache-2.0
"""Initial weights: the same numbers at every degree, and nobody draws what is not his."""

from collections import OrderedDict

import hyperep_torch as hep
import pytest
import torch
from hyperep_torch import counted
from hyperep_torch.slices import covered
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import hyperep


# ------------------------------------------------------------------------------------------------- numbers by place
def test_numbers_are_uniform_and_normal():
    index = torch.arange(1 << 18)
    u, z = counted.uniform(5, index), counted.normal(5, index)
    n = len(index)
    assert u.min() >= 0
    assert u.max() < 1
    # Each figure's standard error is known; five of them is one chance in a million.
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((u[1:] * u[:-1]).mean() - 0.25) < 5 * (7 / 144 / n) ** 0.5  # neighbours know nothing of each other
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5


def test_they_are_those_of_splitmix64():
    """By hand: the generator of the paper with the key as its state, and the place counting its steps."""

    def reference(key, place):
        mask = (1 << 64) - 1
        z = (key + (place + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    places = [0, 1, 2, 1000, 1 << 40]
    for key in (0, 12345, -7):
        assert counted.uniform(key, torch.tensor(places)).tolist() == [reference(key, place) for place in places]


def test_keys_tell_draws_apart():
    keys = {counted.key_of(seed, path, n) for seed in range(5) for path in ("a", "a.b", "ab") for n in range(3)}
    assert len(keys) == 45


@pytest.mark.parametrize("cut", [(slice(0, 3),), (slice(2, 5), slice(1, 3)), (slice(None), slice(None), slice(4, 7))])
def test_a_part_has_the_numbers_of_its_place(cut):
    whole = torch.empty(5, 6, 7, dtype=torch.float64)
    counted.fill(whole, whole.shape, (0, 0, 0), lambda places: counted.uniform(1, places))
    part = torch.empty_like(whole[cut])
    offset = [(s.start or 0) for s in (*cut, *[slice(None)] * (3 - len(cut)))]
    counted.fill(part, whole.shape, offset, lambda places: counted.uniform(1, places))
    assert torch.equal(part, whole[cut])
    strided = torch.empty(7, 6, 5, dtype=torch.float64).permute(2, 1, 0)
    counted.fill(strided, whole.shape, (0, 0, 0), lambda places: counted.uniform(1, places))
    assert torch.equal(strided, whole)


# ------------------------------------------------------------------------------------------------------- init_weights
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.moe = hep.MoE(8, 12, 4, 2, num_shared_experts=1, expert_bias=True)
        self.head = nn.Linear(8, 5)


def _values(model):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in model.state_dict().items()}


def _unsharded(seed):
    model = Model()
    hep.init_weights(model, seed)
    return _values(model)


def test_weights_are_what_the_modules_say():
    values = _unsharded(0)
    assert values["tokens.weight"].std() > 0.8
    assert torch.equal(values["norm.weight"], torch.ones(8))
    assert values["attention.in_proj_bias"].abs().max() == values["attention.out_proj.bias"].abs().max() == 0
    assert 0.2 < values["moe.experts.w1"].abs().max() * 8**0.5 <= 1
    assert 0.2 < values["moe.router.gate"].abs().max() * 8**0.5 <= 1
    assert not torch.equal(values["moe.experts.w1"], values["moe.experts.w3"])
    again, other = _unsharded(0), _unsharded(1)
    for name, value in values.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(values["moe.experts.w1"], other["moe.experts.w1"])


def test_it_leaves_the_generator_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    model = nn.Linear(3, 3)
    torch.manual_seed(0)
    hep.init_weights(model)
    assert torch.equal(torch.rand(3), wanted)


def _degrees(platform, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        model = Model()
    hep.ExpertParallel().apply(model.moe.experts, mesh)
    hep.fully_shard(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(platform.rank)  # whatever else they have drawn
    hep.init_weights(model, seed=7)
    return {name: value.numpy() for name, value in _values(model).items()}


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_the_same_numbers_at_every_degree(four, shape):
    wanted = _unsharded(7)
    for values in four.run(_degrees, shape):
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            assert torch.equal(torch.from_numpy(value), wanted[name]), name


def _tensor_parallel(platform):
    with torch.device("meta"):
        experts = hep.GroupedExperts(8, 12, 4)
    hyperep.ExpertTensorParallel().apply(experts, hyperep.init_device_mesh(platform, (2, 2), ("ep", "tp")))
    experts.to_empty(device="cpu")
    hep.init_weights(experts, seed=7)
    return {name: value.numpy() for name, value in _values(experts).items()}


def test_slices_of_experts(four):
    whole = hep.GroupedExperts(8, 12, 4)
    hep.init_weights(whole, seed=7)
    for values in four.run(_tensor_parallel):
        for name, value in values.items():
            assert torch.equal(torch.from_numpy(value), whole.get_parameter(name)), name


def _memory(platform, by_slices):
    """Bytes at most, over this rank's share, while a layer is drawn whose whole is four times the share."""
    import resource

    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        experts = PerExpert(96, 512, 2048) if by_slices else hep.GroupedExperts(512, 2048, 64)
    hep.ExpertParallel().apply(experts, mesh)
    share = sum(p.to_local().numel() * 4 for p in experts.parameters())
    experts.to_empty(device="cpu")
    with torch.no_grad():
        for p in experts.parameters():
            p.to_local().zero_()  # touched, so that it is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hep.init_weights(experts)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert next(experts.parameters()).to_local().std() > 0.01
    return share, (after - before) * 1024


@pytest.mark.parametrize("by_slices", [False, True])
def test_nobody_holds_more_than_its_share(four, by_slices):
    for share, more in four.run(_memory, by_slices):
        assert 0 <= share - 3 * 512 * 2048 * 16 * 4 < 1 << 20
        assert more < 0.1 * share


def test_what_nobody_knows_is_refused_before_anything_is_drawn():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 5.0))

    model = nn.Sequential(nn.Linear(3, 3), Scale())
    before = _values(model)
    with pytest.raises(
        ValueError, match=r"init_weights: 1 \(Scale\) have parameters or buffers and no reset_parameters"
    ):
        hep.init_weights(model)
    for name, value in _values(model).items():
        assert torch.equal(value, before[name])
    with torch.device("meta"), pytest.raises(ValueError, match="weight, bias are on the meta device"):
        hep.init_weights(nn.Linear(3, 3))

    class Dropped(nn.Linear):
        @torch.no_grad()
        def reset_parameters(self):
            self.weight.bernoulli_(0.5)

    with pytest.raises(NotImplementedError, match=r"weight is filled by aten::bernoulli_.float"):
        hep.init_weights(Dropped(3, 3))


def _truncated(platform):
    """Numbers that are drawn into temporaries until they fit; and a parameter that is drawn in two parts."""

    class Truncated(nn.Linear):
        def reset_parameters(self):
            nn.init.trunc_normal_(self.weight, std=0.5, a=-1, b=1)
            with torch.no_grad():
                self.bias[:4].normal_()
                self.bias[4:].uniform_(2, 3)

    whole, sharded = Truncated(6, 8), Truncated(6, 8)
    mesh = init_device_mesh("cpu", (platform.world_size,))
    sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.data, mesh, [Shard(0)]))
    for module in (whole, sharded):
        hep.init_weights(module, seed=3)
    assert torch.equal(sharded.weight.full_tensor(), whole.weight)
    assert 0.2 < whole.weight.std() < 0.6
    assert whole.weight.abs().max() <= 1
    assert whole.bias[4:].min() >= 2


def test_other_distributions(two):
    two.run(_truncated)


# ------------------------------------------------------------------------------------------------------------- slices
def _each(fill):
    return lambda w: [fill(w[e]) for e in range(len(w))]


def _two_parts(w):
    w[0].zero_()
    w[1:].normal_()


def _assigned(w):
    w[0] = 1.0
    w[1:] = torch.arange(48.0).view(6, 8)
    w[2, 3:] = torch.randn(3, 8)
    w[3, 1, 2] = 7.0


def _copied(w):
    w.copy_(torch.randn(4, 6, 8))
    w[1].copy_(torch.randn(6, 8))
    w[:, 2].copy_(torch.randn(8))
    w.mul_(torch.arange(8.0))


def _views_of_views(w):
    w.uniform_()
    w[1:3][1].T[2:5].normal_()
    w.select(0, 1).narrow(1, 3, 2).unsqueeze(0).fill_(3)
    w.permute(2, 0, 1)[..., None, 1].mul_(2)
    w.data[0].add_(1)


def _temporary(w):
    drawn = torch.randn_like(w)
    drawn[1].zero_()
    w.copy_(drawn.clamp_(-1, 1))
    w[2].copy_(torch.rand_like(w[2]).sub_(0.5))


WAYS = {
    "kaiming": _each(lambda expert: nn.init.kaiming_uniform_(expert, a=5**0.5)),
    "two parts": _two_parts,
    "iteration": lambda w: [nn.init.xavier_normal_(expert) for expert in w],
    "unbind": lambda w: [column.uniform_(-1, 1) for column in w.unbind(1)],
    "chunk": lambda w: [part.normal_(part.shape[1]) for part in (*w.chunk(3, 2), *w.split([1, 5], 1))],
    "transposed": lambda w: [nn.init.kaiming_normal_(expert.T) for expert in w],
    "truncated": _each(lambda expert: nn.init.trunc_normal_(expert, std=0.5, a=-1, b=1)),
    "truncated far": _each(lambda expert: nn.init.trunc_normal_(expert, std=0.5, a=-0.01, b=0.01)),
    "orthogonal": _each(nn.init.orthogonal_),
    "eye": _each(nn.init.eye_),
    "dirac": lambda w: nn.init.dirac_(w),
    "assigned": _assigned,
    "copied": _copied,
    "views of views": _views_of_views,
    "temporary": _temporary,
}
REFUSED = {
    "merged": (
        _each(lambda expert: expert.view(-1).normal_()),
        "w is sharded, and reset_parameters of Filled at inner",
    ),
    "read": (lambda w: [w.normal_(), w[0].div_(w[0].norm())], "by aten::linalg_vector_norm"),
    "from another": (lambda w: [w.normal_(), w[0].copy_(w[1])], "by aten::copy_"),
    "other numbers": (_each(lambda expert: expert.exponential_()), "inner.w is filled by aten::exponential_"),
    "like": (lambda w: w.copy_(torch.empty_like(w).exponential_()), "is filled by aten::exponential_"),
    "local": (lambda w: w.to_local().normal_(), "Filled at inner draws this rank's part of inner.w by itself"),
    "data": (lambda w: setattr(w, "data", torch.randn(4, 6, 8)), "inner.w (4, 6, 8) is sharded, and reset_parameters"),
    "replaced": (lambda w: None, "and assign neither another tensor nor its .data"),
    "a part": (lambda w: w[:3].normal_(), "of Filled has not written to all of it in place"),
    "a gap": (lambda w: [w[:3].normal_(), w[2:, 1:].normal_()], "of Filled has not written to all of it in place"),
    "nothing": (lambda w: None, "of Filled has not written to all of it in place"),
}


class Filled(nn.Module):
    """A parameter that is filled in one of these ways."""

    def __init__(self, way):
        super().__init__()
        self.w = nn.Parameter(torch.full((4, 6, 8), torch.nan))
        self.way = way

    def reset_parameters(self):
        (WAYS.get(self.way) or REFUSED[self.way][0])(self.w)
        if self.way == "replaced":
            self.w.zero_()
            self.w = nn.Parameter(torch.randn(4, 6, 8))


def _filled(way, mesh=None, layout=()):
    model = nn.ModuleDict({"inner": Filled(way), "after": nn.Linear(3, 3)})
    whole = model["inner"].w.data
    if mesh is not None:
        model["inner"].w = nn.Parameter(distribute_tensor(whole, mesh, layout))
    hep.init_weights(model, seed=3)
    return _values(model)


LAYOUTS = {
    (2,): [[Shard(0)], [Shard(1)], [Shard(2)], [Replicate()], [_StridedShard(1, split_factor=3)]],
    (2, 2): [
        [Shard(0), Shard(1)],
        [Shard(1), Shard(1)],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Shard(0), _StridedShard(2, split_factor=2)],
    ],
}


def _wrong_slices(platform, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    wrong = []
    for way in WAYS:
        wanted = _filled(way)
        for layout in LAYOUTS[shape]:
            torch.manual_seed(platform.rank)
            values = _filled(way, mesh, layout)
            wrong += [(way, layout, name) for name, value in wanted.items() if not torch.equal(values[name], value)]
    return wrong


def test_slices_have_the_same_numbers_at_every_layout(two, four):
    assert two.run(_wrong_slices, (2,)) == [[]] * 2
    assert four.run(_wrong_slices, (2, 2)) == [[]] * 4
    for way in WAYS:
        assert not _filled(way)["inner.w"].isnan().any(), way


def _messages(platform):
    mesh = init_device_mesh("cpu", (platform.world_size,))
    messages = {}
    for way in REFUSED:
        for layout in LAYOUTS[2,]:
            with pytest.raises(NotImplementedError) as caught:
                _filled(way, mesh, layout)
            messages[way, str(layout)] = str(caught.value)
    return messages


def test_what_a_part_does_not_tell_is_refused_on_every_rank(two):
    first, second = two.run(_messages)
    assert first == second
    assert len(first) == len(REFUSED) * len(LAYOUTS[2,])
    for (way, _), message in first.items():
        assert message.startswith("init_weights: ")
        assert REFUSED[way][1] in message
    assert "fill it, or slices of it, in place: with torch.nn.init" in first["data", str([Shard(0)])]


def test_what_boxes_cover():
    evens, odds = ((0, 2, 2), (0, 1, 3)), ((1, 2, 2), (0, 1, 3))
    assert covered((4, 3), {evens, odds})
    assert not covered((4, 3), {evens, ((1, 2, 2), (0, 1, 2))})
    assert covered((4, 3), {((e, 1, 1), (0, 1, 3)) for e in range(4)})
    assert not covered((4, 3), {((0, 1, 3), (0, 1, 3)), ((3, 1, 1), (0, 1, 2))})
    assert covered((), {()})
    assert covered((0, 3), set())
    assert not covered((2,), set())


class PerExpert(nn.Module):
    """As many people draw them: each expert by itself."""

    def __init__(self, experts, dim, hidden):
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        self.bias = nn.Parameter(torch.empty(experts, dim))

    def reset_parameters(self):
        for e in range(len(self.up)):
            nn.init.kaiming_uniform_(self.up[e], a=5**0.5)
        nn.init.kaiming_uniform_(self.down[0], a=5**0.5)
        nn.init.normal_(self.down[1:], std=0.02)
        self.bias[0].zero_()
        self.bias[1:].normal_()


def _per_expert():
    return nn.Sequential(OrderedDict(tokens=nn.Embedding(11, 8, padding_idx=3), experts=PerExpert(8, 8, 12)))


def _own_experts(platform, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        model = _per_expert()
    hep.ExpertParallel().apply(model.experts, mesh)
    hep.fully_shard(model, mesh)
    model.to_empty(device="cpu")
    hep.init_weights(model, seed=7)
    return {name: value.numpy() for name, value in _values(model).items()}


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_experts_and_rows_that_are_filled_by_themselves(four, shape):
    whole = _per_expert()
    hep.init_weights(whole, seed=7)
    wanted = _values(whole)
    assert torch.equal(wanted["tokens.weight"][3], torch.zeros(8))
    assert 0.9 < wanted["experts.up"].abs().max() * 8**0.5 <= 1
    assert 0.9 < wanted["experts.down"][0].abs().max() * 12**0.5 <= 1
    for values in four.run(_own_experts, shape):
        for name, value in values.items():
            assert torch.equal(torch.from_numpy(value), wanted[name]), name


def test_wrappers_do_not_change_the_numbers():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Filled("kaiming")))

    plain, wrapped = model(), model()
    wrapped[1][0] = checkpoint_wrapper(torch.compile(wrapped[1][0]))
    wrapped[1] = checkpoint_wrapper(wrapped[1])
    for each in (plain, wrapped):
        hep.init_weights(each, seed=2)
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(one, other)
