# SPDX-License-Identifier: Apache-2.0
"""Experts of an engineer's own, in every shape, sharded: what they are without ranks, or an error in words."""

import copy
import doctest
import importlib
import pathlib
import pickle
import re

import hyperep_torch as hep
import own_experts
import pytest
import torch
from own_experts import DIM, EXPERTS, KINDS, same_as_without_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import hyperep

NAMED = {"colwise": ("gate_up", "gate_up_bias"), "rowwise": ("down", "down_bias")}
BOTH = {"gate_up": 2, "gate_up_bias": 2}
SLICED = {
    "[E, out, in], packed": {**NAMED, "packed": BOTH},
    "[E, in, out], interleaved": {**NAMED, "interleaved": BOTH, "transposed": True},
    "grouped_matmul, [E, in, out]": {**NAMED, "packed": BOTH, "transposed": True},
    "called with tokens alone": {**NAMED, "packed": BOTH},
    "a list of linear maps": {"colwise": ("0.weight", "0.bias"), "rowwise": ("1.weight", "1.bias")},
}


def _expert_parallel(platform):
    ranks = platform.world_size
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    for kind in KINDS:
        same_as_without_ranks(platform, kind, hep.ExpertParallel(), mesh, ranks, platform.rank)


@pytest.mark.composes(
    "modules of your own", "experts in either layout, with biases, fused, buffers, a list of them; rows and tokens"
)
def test_over_two_ranks(two):
    two.run(_expert_parallel)


def _sliced(platform):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    for kind, settings in SLICED.items():
        style = hep.ExpertTensorParallel(**settings)
        same_as_without_ranks(platform, kind, style, mesh, 2, platform.rank // 2)
    settings = SLICED["called with tokens alone"]
    for way in ({"exchange": "rows"}, {"chunks": 2}):
        style = hep.ExpertTensorParallel(**way, **settings)
        same_as_without_ranks(platform, "called with tokens alone", style, mesh, 2, platform.rank // 2)
    style = hep.TensorParallel(**settings)
    same_as_without_ranks(platform, "called with tokens alone", style, mesh["tp"], 1, 0)
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    for kind in ("numbers and buffers", "called with tokens alone", "a list of linear maps"):
        same_as_without_ranks(platform, kind, hep.ExpertParallel(), mesh, 4, platform.rank)


@pytest.mark.composes("modules of your own", "the same sliced over `tp`")
def test_in_slices_and_over_four_ranks(four):
    four.run(_sliced)


@pytest.mark.parametrize("name", ["grouped", "stacked", "full_state", "load_full_state"])
def test_what_docstrings_show(name):
    tried = doctest.testmod(importlib.import_module(f"hyperep_torch.{name}"))
    assert tried.attempted > 1
    assert not tried.failed


def test_what_the_page_shows():
    text = pathlib.Path(__file__).parents[3].joinpath("docs", "torch.md").read_text(encoding="utf-8")
    examples = "\n\n".join(re.findall(r"^```pycon\n(.*?)^```", text, flags=re.M | re.S))
    tried = doctest.DocTestParser().get_doctest(examples, {}, "torch.md", "torch.md", 0)
    assert len(tried.examples) > 8
    assert not doctest.DocTestRunner().run(tried).failed


# -------------------------------------------------------------------------------------------------- what is refused
class Answering(own_experts.Written):
    """Returns something beside the rows."""

    def forward(self, *inputs):
        return super().forward(*inputs), torch.zeros(())


def _scaled_by(*shape):
    module = own_experts.Written()
    module.scale = nn.Parameter(torch.ones(*shape))
    return module


@pytest.mark.parametrize("style", [hep.ExpertParallel, hep.TensorParallel])
@pytest.mark.parametrize("call", ["rows", "tokens"])
def test_what_is_returned_beside_the_rows_is_refused(platform, call, style):
    mesh = hyperep.init_device_mesh(platform, (1,), ("tp" if style is hep.TensorParallel else "ep",))
    module = Answering().double()
    (style() if style is hep.ExpertParallel else style(**NAMED, packed=BOTH)).apply(module, mesh)
    with pytest.raises(TypeError, match=r"experts returned a builtins.tuple, but .* one tensor .* return it alone"):
        module(*own_experts.data(call, 0)[0])


@pytest.mark.parametrize(
    ("style", "module", "told"),
    [
        (hep.ExpertParallel(), lambda: _scaled_by(DIM), r"'scale': \(6,\)\}.*A number for each expert is \[experts\]"),
        (
            hep.ExpertParallel(),
            lambda: nn.ModuleList(own_experts.One() for _ in range(4)),
            "hyperep_torch.stack_experts",
        ),
        (hep.ExpertTensorParallel(), own_experts.Written, r"'gate_up' is neither in colwise=\('w1', 'w3'\)"),
        (
            hep.ExpertTensorParallel(**NAMED, packed={"gate_up": 2}),
            own_experts.Written,
            r"'gate_up_bias' of shape \(4, 16\) gives 16 .* say packed=\{'gate_up_bias': 2\}",
        ),
        (
            hep.ExpertTensorParallel(**NAMED, packed=BOTH),
            lambda: own_experts.Written(transposed=True),
            r"gate_up' of shape \(4, 6, 16\) is said to hold 2 weights, of 3 features .* transposed=True",
        ),
        (
            hep.ExpertTensorParallel(colwise=(*NAMED["colwise"], "scale"), rowwise=NAMED["rowwise"], packed=BOTH),
            lambda: _scaled_by(EXPERTS),
            r"'scale' of shape \(4,\) cannot be split .* and biases \[experts, out\]",
        ),
        (
            hep.ExpertTensorParallel(**NAMED, packed=BOTH, balance=hyperep.Balance()),
            own_experts.Written,
            r"\['down_bias'\] are added by one rank of tp alone",
        ),
    ],
)
def test_shapes_that_are_refused(platform, style, module, told):
    shape, names = ((1, 1), ("ep", "tp")) if isinstance(style, hep.ExpertTensorParallel) else ((1,), ("ep",))
    made = module()
    with pytest.raises(ValueError, match=told):
        style.apply(made, hyperep.init_device_mesh(platform, shape, names))
    assert not any(isinstance(p, DTensor) for p in made.parameters())


# ------------------------------------------------------------------------------------------------ a list of experts
def _list(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList(own_experts.One() for _ in range(EXPERTS))


def test_checkpoints_of_the_list_go_in_and_out():
    listed, holder = _list(), nn.Module()
    listed[2].rows.fill_(7)
    holder.experts = hep.stack_experts(_list(seed=1))
    given = {f"experts.{name}": value for name, value in listed.state_dict().items()}
    holder.load_state_dict(given)
    found = hep.full_state_dict(holder)
    assert set(found) == set(given)
    assert all(torch.equal(found[name], value) for name, value in given.items())
    own = holder.state_dict()
    assert {name: tuple(t.shape) for name, t in own.items()}["experts.out.weight"] == (EXPERTS, DIM, 8)
    holder.load_state_dict(own)
    del given["experts.3.out.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.out\.bias"):
        holder.load_state_dict(given)


def test_without_any_rows_all_gradients_are_zero():
    stack = hep.stack_experts(_list())
    x = torch.zeros(0, DIM, requires_grad=True)
    stack(x, torch.zeros(EXPERTS, dtype=torch.int64)).sum().backward()
    assert x.grad.shape == (0, DIM)
    assert all(p.grad.shape == p.shape and not p.grad.any() for p in stack.parameters())


def test_a_copy_of_a_stack_has_its_own_weights_and_mode():
    stack = hep.stack_experts(nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(1.0)) for _ in range(2)))
    rows, sizes = torch.ones(3, DIM), torch.tensor([1, 2])
    assert not stack(rows, sizes).any()  # everything is dropped
    twin = copy.deepcopy(stack).eval()
    wanted = twin(rows, sizes)
    assert wanted.any()
    assert not stack(rows, sizes).any()
    with torch.no_grad():
        stack.get_parameter("0.weight").zero_()
    assert torch.equal(twin(rows, sizes), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(rows, sizes), wanted)


def _altered(change):
    experts = _list()
    change(experts)
    return experts


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        (list, "got no experts"),
        (lambda: [nn.Linear(2, 2), nn.Identity()], "experts 0 and 1 differ in"),
        (lambda: [nn.Linear(2, 2), nn.Linear(2, 3)], "differ in the attribute 'out_features': 2 and 3"),
        (
            lambda: _altered(lambda e: setattr(e[2], "number", 2)),
            "0 and 2 differ in the attribute 'number': None and 2",
        ),
        (lambda: _altered(lambda e: e[1].out.weight.requires_grad_(False)), "'out.weight'.*with a gradient and"),
        (lambda: _altered(lambda e: setattr(e[3], "out", e[1].out)), "3.out.weight is 1.out.weight too"),
    ],
)
def test_lists_that_cannot_be_stacked(experts, told):
    with pytest.raises(ValueError, match=told):
        hep.stack_experts(experts())


class Block(nn.Module):
    """Experts, and nothing else."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *inputs):
        return self.experts(*inputs)


class Resetting(nn.ModuleList):
    """A list whose experts know how their own tensors are drawn."""

    def __init__(self, experts):
        super().__init__(experts)
        for expert in self:
            expert.__class__ = _Resetting


class _Resetting(own_experts.One):
    def reset_parameters(self):
        nn.init.uniform_(self.gain)
        self.rows.zero_()


def _list_made_and_loaded(platform):
    for shape in ((2, 1), (1, 2)):
        _made_and_loaded_over(platform, shape)


def _made_and_loaded_over(platform, shape):
    """Drawn on ``meta``, and read from the list's checkpoint, in parts: what the list has."""
    wanted = Resetting(_list())
    hep.init_weights(Block(wanted), seed=3)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))
    with torch.device("meta"):
        drawn = Block(hep.stack_experts(Resetting(_list())))
    read = Block(hep.stack_experts(Resetting(_list(seed=1))))
    for model in (drawn, read):
        hep.ExpertParallel().apply(model.experts, mesh)
        hep.fully_shard(model, mesh)
    drawn.to_empty(device="cpu")
    hep.init_weights(drawn, seed=3)
    state = {f"experts.{name}": value for name, value in wanted.state_dict().items()}
    read.load_state_dict(state)
    for model in (drawn, read):
        found = hep.full_state_dict(model)
        assert set(found) == (set(state) if platform.rank == 0 else set())
        for name, value in found.items():
            assert torch.equal(value, state[name]), name
    assert not torch.equal(state["experts.0.out.weight"], state["experts.3.out.weight"])


def test_a_list_made_on_meta_and_read_from_its_checkpoint(two):
    two.run(_list_made_and_loaded)
