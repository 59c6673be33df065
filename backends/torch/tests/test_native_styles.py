# SPDX-License-Identifier: Apache-2.0
"""hyperep's styles in PyTorch's plans, PyTorch's styles in hyperep's, and meshes by any name."""

import copy

import hyperep_torch as hep
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, parallel

import hyperep


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8), "moe": hep.MoE(8, 12, 4, 2)})
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
            x = x + layer["moe"](x)
        return x


def _models():
    torch.manual_seed(0)
    whole = Model().double()
    return whole, copy.deepcopy(whole)


def _same(whole, sharded, x, every=lambda g: g):
    for module in (whole, sharded):
        out = module(x)
        out.square().sum().backward()
    torch.testing.assert_close(sharded(x), whole(x))
    for name, p in sharded.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(every(grad), whole.get_parameter(name).grad, msg=lambda m, name=name: f"{name}: {m}")


def test_they_are_styles_of_both():
    for style in (
        hep.ExpertParallel(),
        hep.TensorParallel(),
        hep.ExpertTensorParallel(),
        hep.ColwiseParallel(),
        hep.RowwiseParallel(),
    ):
        assert isinstance(style, parallel.ParallelStyle)
        assert isinstance(style, getattr(hyperep, type(style).__name__))


def _in_pytorchs_plan(platform):
    """On every rank the same tokens, so every rank's plain gradient is whole; experts see them once a rank."""
    whole, sharded = _models()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ranks of experts", "tensor"))
    experts = {"layers.*.moe.experts": hep.ExpertParallel()}
    linear = {"layers.*.up": hep.ColwiseParallel(), "layers.*.down": hep.RowwiseParallel()}
    assert parallel.parallelize_module(sharded, mesh["ranks of experts"], experts) is sharded
    parallel.parallelize_module(sharded, mesh["tensor"], linear)
    assert sharded.layers[1]["moe"].experts.w1.to_local().shape == (2, 12, 8)
    assert sharded.layers[1]["up"].weight.to_local().shape == (8, 8)
    assert sharded.layers[0]["moe"].experts.w1.device_mesh.mesh_dim_names == ("ranks of experts",)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module, times in ((whole, 2), (sharded, 1)):
        (times * module(x).square().sum()).backward()
    for name, p in sharded.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        grad = grad if "experts" in name else 2 * grad
        torch.testing.assert_close(grad, whole.get_parameter(name).grad)


@pytest.mark.composes("tensor parallelism", "hyperep's styles in PyTorch's `parallelize_module`")
def test_hyperep_styles_in_pytorchs_plan(four):
    four.run(_in_pytorchs_plan)


def _in_our_plan(platform, function):
    whole, sharded = _models()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep", "tp"))
    plan = {
        "layers.*.moe.experts": hep.ExpertTensorParallel(),
        "layers.*.up": parallel.ColwiseParallel(),
        "layers.*.down": parallel.RowwiseParallel(),
    }
    {"hyperep": hyperep, "hyperep_torch": hep}[function].parallelize_module(sharded, mesh, plan)
    assert sharded.layers[0]["up"].weight.to_local().shape == (8, 8)
    _same(whole, sharded, torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("function", ["hyperep", "hyperep_torch"])
@pytest.mark.composes("tensor parallelism", "PyTorch's styles in hyperep's `parallelize_module`")
def test_pytorchs_styles_in_our_plan(two, function):
    two.run(_in_our_plan, function)


def _sequence_parallel(platform):
    """Each rank has a part of the sequence; the norm gives DTensors, of which the layer takes the local parts."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.moe = nn.LayerNorm(8), hep.MoE(8, 12, 4, 2)

        def forward(self, x):
            return self.moe(self.norm(x))

    torch.manual_seed(0)
    whole = Normed().double()
    sharded, mesh, part = copy.deepcopy(whole), init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), [Shard(1)]
    plan = {
        "norm": parallel.SequenceParallel(sequence_dim=1),
        "moe": parallel.PrepareModuleInput(input_layouts=part, desired_input_layouts=part, use_local_output=True),
        "moe.experts": hep.ExpertParallel(),
    }
    hep.parallelize_module(sharded, mesh, plan)
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(2, dim=1)[platform.rank].clone().requires_grad_()
    x.requires_grad_()
    out, wanted = sharded(mine), whole(x)
    torch.testing.assert_close(out, wanted.chunk(2, dim=1)[platform.rank])
    for y in (out, wanted):
        y.square().sum().backward()
    torch.testing.assert_close(mine.grad, x.grad.chunk(2, dim=1)[platform.rank])
    for name, p in sharded.named_parameters():
        # The router is plain, and has the gradient of this rank's tokens, as everywhere.
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else platform.all_reduce(p.grad)
        torch.testing.assert_close(grad, whole.get_parameter(name).grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.composes(
    "tensor parallelism",
    "`SequenceParallel` before a layer, whose input is prepared by "
    "`PrepareModuleInput(use_local_output=True)`: a rank routes the tokens of its part of the sequence",
)
def test_sequence_parallel_before_a_layer(two):
    two.run(_sequence_parallel)


UNUSABLE = {
    "a class": ({"layers.*.up": hep.ColwiseParallel}, TypeError, "give it an object"),
    "nothing": ({"layers.*.up": None}, TypeError, "'layers.*.up' is a builtins.NoneType, which is no parallel style"),
    "two dimensions": ({"layers.0.up": hep.ExpertTensorParallel()}, ValueError, r"needs the dimensions \('ep', 'tp'\)"),
}


@pytest.mark.parametrize("which", UNUSABLE)
def test_an_unusable_entry_changes_nothing(platform, which):
    plan, error, message = UNUSABLE[which]
    model = Model()
    with pytest.raises(error, match=message):
        hyperep.parallelize_module(
            model,
            hyperep.init_device_mesh(platform, (1,), ("ep",)),
            {"layers.*.moe.experts": hep.ExpertParallel(), **plan},
        )
    assert not any(isinstance(p, DTensor) for p in model.parameters())


REFUSED = {
    "features that do not divide": ("odd", hep.ColwiseParallel(), ValueError, "out=7 features"),
    "a module that is not linear": ("norm", hep.RowwiseParallel(), ValueError, "for other modules apply the style to"),
    "experts that do not divide": ("three", hep.ExpertParallel(), ValueError, "num_experts=3 is not divisible"),
    "a list": ("several", hep.ExpertParallel(), ValueError, "stack_experts"),
    "PyTorch's style": ("norm", parallel.ColwiseParallel(), NotImplementedError, "serves nn.Linear and nn.Embedding"),
}


def _refused(platform, which):
    name, style, error, message = REFUSED[which]
    model = nn.ModuleDict(
        {
            "first": hep.GroupedExperts(8, 12, 4),
            "odd": nn.Linear(8, 7),
            "norm": nn.LayerNorm(8),
            "three": hep.GroupedExperts(8, 12, 3),
            "several": nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
        }
    )
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    with pytest.raises(error, match=message):
        hyperep.parallelize_module(model, mesh, {"first": hep.ExpertParallel(), name: style})
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("which", REFUSED)
def test_what_a_style_refuses_changes_nothing(two, which):
    two.run(_refused, which)


def _another_source(platform):
    mesh = init_device_mesh("cpu", (platform.world_size,))
    with pytest.raises(ValueError, match="src_data_rank=1, but shards are parts of what the first rank"):
        parallel.parallelize_module(hep.MoE(8, 12, 4, 2).experts, mesh, hep.ExpertParallel(), src_data_rank=1)
    # Where there is nothing to send, nothing has a source.
    meta = hep.MoE(8, 12, 4, 2, device="meta")
    parallel.parallelize_module(meta.experts, mesh, hep.ExpertParallel(), src_data_rank=None)
    assert meta.experts.w1.to_local().shape == (2, 12, 8)
    assert meta.experts.w1.is_meta


def test_shards_come_from_the_first_rank(two):
    two.run(_another_source)
