# SPDX-License-Identifier: Apache-2.0
"""Experts and linear modules that know nothing of hyperep, sharded: their own forward sees this rank's parts."""

import copy
import threading

import hyperep_torch as hep
import pytest
import torch
import torch.nn.functional as F
from hyperep_torch.opened import call_opened
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hyperep

DIM, EXPERTS = 6, 4


class Loop(nn.Module):
    """As one would write it first: a loop over experts that indexes the weights."""

    def __init__(self, width=DIM):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, width) / DIM**0.5)
        self.b1 = nn.Parameter(torch.randn(EXPERTS, width))
        self.calls = 0

    def forward(self, rows, tokens_per_expert):
        self.calls += 1
        runs = rows.split(tokens_per_expert.tolist())
        return torch.cat([torch.tanh(run @ self.w1[i] + self.b1[i]) for i, run in enumerate(runs)])


class Nested(nn.Module):
    """Weights in modules below, in a list of parameters, and one that is only read."""

    def __init__(self):
        super().__init__()
        self.inner = Loop()
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(EXPERTS, 1) + 0.5) for _ in range(2)])

    def forward(self, rows, tokens_per_expert):
        of_row = torch.repeat_interleave(self.scales[0] * self.scales[1], tokens_per_expert, dim=0)
        return self.inner(rows, tokens_per_expert) * of_row + self.inner.b1.sum() * 0


def _made(kind, seed=0):
    torch.manual_seed(seed)
    return {"loop": Loop, "nested": Nested}[kind]().double()


def _inputs(rank, rows=9):
    generator = torch.Generator().manual_seed(100 + rank)
    counts = torch.tensor([[3, 0, 4, 2], [0, 1, 1, 7]][rank % 2])
    return torch.randn(rows, DIM, dtype=torch.float64, generator=generator), counts


def _results(module, inputs, parameters=None, call=None):
    """Output, input gradient, weight gradients (whole ones)."""
    rows, counts = inputs
    leaf = rows.clone().requires_grad_()
    out = (module if call is None else call)(leaf, counts)
    out.sin().sum().backward()
    parameters = module.parameters() if parameters is None else parameters
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    module.zero_grad()
    return [out.detach(), leaf.grad, *grads]


def _wanted(whole, ranks, rank):
    """What the unsharded module gives for this rank's rows, and the gradients of all ranks' rows."""
    per_rank = [_results(whole, _inputs(r)) for r in range(ranks)]
    return [*per_rank[rank][:2], *(sum(terms) for terms in zip(*(r[2:] for r in per_rank), strict=True))]


def _agree(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _under_every_tool(platform, kind):
    ranks, rank = platform.world_size, platform.rank
    whole = _made(kind)
    wanted = _wanted(copy.deepcopy(whole), ranks, rank)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    sharded = hyperep.ExpertParallel().apply(copy.deepcopy(whole), mesh)
    assert all(isinstance(p, DTensor) and p.to_local().shape[0] == EXPERTS // ranks for p in sharded.parameters())
    _agree(_results(sharded, _inputs(rank)), wanted)
    # Recomputed, copied, and called with other weights.
    _agree(_results(sharded, _inputs(rank), call=lambda *a: checkpoint(sharded, *a, use_reentrant=False)), wanted)
    twin = copy.deepcopy(sharded)
    with torch.no_grad():
        for p in sharded.parameters():
            p.to_local().mul_(0.5)
    _agree(_results(twin, _inputs(rank)), wanted)
    given = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters()}
    call = lambda *a: functional_call(sharded, given, a)  # noqa: E731
    _agree(_results(sharded, _inputs(rank), list(given.values()), call), wanted)
    # Compiled; what cannot be traced breaks the graph.
    torch._dynamo.reset()
    _agree(_results(twin, _inputs(rank), call=torch.compile(twin, backend="eager")), wanted)


@pytest.mark.parametrize("kind", ["loop", "nested"])
@pytest.mark.composes("modules of your own", "recompute, deep copies, `functional_call`, `torch.compile`")
def test_plain_experts_under_every_tool(two, kind):
    two.run(_under_every_tool, kind)


def _under_fsdp(platform, kind):
    ranks, rank = platform.world_size, platform.rank
    whole = _made(kind)
    wanted = _wanted(copy.deepcopy(whole), ranks, rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    sharded = hep.ExpertParallel().apply(copy.deepcopy(whole), mesh)
    if kind == "nested":
        fully_shard(sharded.inner, mesh=mesh["dp"])  # gathers when it is called
    fully_shard(sharded, mesh=mesh["dp"])
    found = _results(sharded, _inputs(rank))
    _agree([*found[:2], *(2 * g for g in found[2:])], wanted)  # FSDP2 takes the mean over dp


@pytest.mark.parametrize("kind", ["loop"])
@pytest.mark.composes("FSDP2", "experts of your own")
def test_plain_experts_under_fsdp2(four, kind):
    four.run(_under_fsdp, kind)


def _from_threads(platform):
    """Two threads in one module at once: each waits inside the forward for the other."""
    both = threading.Barrier(2, timeout=30)

    class Meeting(Loop):
        def forward(self, rows, tokens_per_expert):
            first = self.w1
            both.wait()
            assert not isinstance(first, DTensor)
            assert not isinstance(self.w1, DTensor)
            out = super().forward(rows, tokens_per_expert)
            both.wait()
            return out

    torch.manual_seed(0)
    module = Meeting().double()
    whole = _made("loop")
    hyperep.ExpertParallel().apply(module, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    found = [None, None]

    def call(i):
        rows, counts = _inputs(i)
        found[i] = module(rows, counts)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(2):
        torch.testing.assert_close(found[i], whole(*_inputs(i)))
    assert isinstance(module.w1, DTensor)


@pytest.mark.composes("modules of your own", "several threads")
def test_from_several_threads(platform):
    _from_threads(platform)


def test_what_a_forward_sets_on_its_module_stays(platform):
    module = Loop().double()
    hyperep.ExpertParallel().apply(module, hyperep.init_device_mesh(platform, (1,), ("ep",)))
    for _ in range(3):
        module(*_inputs(0))
    assert module.calls == 3
    assert isinstance(module.w1, DTensor)


def test_a_module_without_shards_is_called_as_it_is():
    module = Loop()
    assert call_opened(module, lambda seen: seen) is module


# -------------------------------------------------------------------------------------------------- linear modules
class FeedForward(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 8, bias=bias), nn.Linear(8, DIM, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def _linear(platform, bias, compiled):
    torch.manual_seed(0)
    whole = FeedForward(bias).double()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("tp",))
    hyperep.parallelize_module(sharded, mesh, {"up": hyperep.ColwiseParallel(), "down": hyperep.RowwiseParallel()})
    x = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    call = torch.compile(sharded, backend="eager") if compiled else sharded
    results = []
    for module, function in ((whole, whole), (sharded, call)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    whole_results, found = results
    found = [f.full_tensor() if isinstance(f, DTensor) else f for f in found]
    _agree(found, whole_results)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.composes(
    "tensor parallelism",
    "`nn.Linear` under `ColwiseParallel` and `RowwiseParallel`, with and without bias, compiled",
)
def test_linear_modules_of_pytorch(two, bias, compiled):
    two.run(_linear, bias, compiled)


class Bound(Loop):
    """Calls a method that it has bound to itself when it was made, or the same one by its name."""

    def __init__(self, bound):
        super().__init__()
        self.fn = self._one
        self.bound = bound

    def _one(self, run, i):
        return torch.tanh(run @ self.w1[i] + self.b1[i])

    def forward(self, rows, tokens_per_expert):
        one = self.fn if self.bound else self._one
        return torch.cat([one(run, i) for i, run in enumerate(rows.split(tokens_per_expert.tolist()))])


def _bound(platform):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for bound in (False, True):
        experts = hep.ExpertParallel().apply(Bound(bound).double(), mesh)
        if not bound:
            assert experts(*_inputs(platform.rank)).shape == (9, DIM)
        else:
            with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
                experts(*_inputs(platform.rank))


def test_a_method_that_a_module_has_bound_to_itself_goes_round_the_parts(two):
    two.run(_bound)
