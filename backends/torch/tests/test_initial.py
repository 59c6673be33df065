# SPDX-License-Identifier: Apache-2.0
"""Initial weights: the same numbers at every degree, and nobody draws what is not his."""

import hyperep_torch as hep
import pytest
import torch
from hyperep_torch import counted
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


def _memory(platform):
    """Bytes at most, over this rank's share, while a layer is drawn whose whole is four times the share."""
    import resource

    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        experts = hep.GroupedExperts(512, 2048, 64)
    hep.ExpertParallel().apply(experts, mesh)
    share = sum(p.to_local().numel() * 4 for p in experts.parameters())
    experts.to_empty(device="cpu")
    with torch.no_grad():
        for p in experts.parameters():
            p.to_local().zero_()  # touched, so that it is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hep.init_weights(experts)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert experts.w1.to_local().std() > 0.01
    return share, (after - before) * 1024


def test_nobody_holds_more_than_its_share(four):
    for share, more in four.run(_memory):
        assert share == 3 * 512 * 2048 * 16 * 4
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
