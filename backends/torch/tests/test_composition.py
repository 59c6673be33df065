# SPDX-License-Identifier: Apache-2.0
"""Layers of experts among PyTorch's own tools: recompute, DDP, pipelines, averaged weights, checkpoints."""

import copy
from functools import partial

import hyperep_torch as hep
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

DIM, EXPERTS = 8, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.moe = hep.MoE(DIM, 12, EXPERTS, 2)

    def forward(self, x):
        x = x + torch.tanh(self.linear(x))
        return x + self.moe(x)


def _models(mesh, blocks=1):
    """The same weights whole, and with the experts spread over *mesh*."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(Block() for _ in range(blocks))).double()
    spread = copy.deepcopy(whole)
    for block in spread:
        hep.ExpertParallel().apply(block.moe.experts, mesh)
    return whole, spread


def _batch(rank, step=0, rows=10):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(rows, DIM, dtype=torch.float64, generator=generator)


def _loss(model, x):
    return model(x).sin().mean()


def _full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _close(found, wanted):
    torch.testing.assert_close(_full(found), wanted, rtol=1e-10, atol=1e-12)


def _mean_gradients(whole, ranks):
    (sum(_loss(whole, _batch(r)) for r in range(ranks)) / ranks).backward()
    return {name: p.grad for name, p in whole.named_parameters()}


# ---------------------------------------------------------------------------------------------------------- recompute
_SAVED = [torch.ops._c10d_functional.all_to_all_single.default]
RECOMPUTE = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _SAVED)},
}


def _recomputed(platform, kind):
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    _, model = _models(mesh)
    results, exchanges = [], []
    for call in (model, lambda x: checkpoint(model, x, **RECOMPUTE[kind])):
        x = _batch(platform.rank, rows=0 if platform.rank == 1 else 10).requires_grad_()
        before = dist.group.WORLD._get_sequence_number_for_group()
        call(x).sin().sum().backward()
        exchanges.append(dist.group.WORLD._get_sequence_number_for_group() - before)
        results.append([x.grad, *(_full(p.grad) for p in model.parameters())])
        model.zero_grad()
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    return exchanges


@pytest.mark.parametrize("kind", RECOMPUTE)
@pytest.mark.composes(
    "recompute",
    "`checkpoint`, reentrant and not, and selective: with "
    "`torch.ops._c10d_functional.all_to_all_single.default` in the list no exchange is made again; also "
    "where a rank has no tokens",
)
def test_recompute(two, kind):
    for plain, again in two.run(_recomputed, kind):
        # Forward and backward, and forward once more unless what the exchanges brought is saved.
        assert again > plain if kind != "selective" else again == plain


# ---------------------------------------------------------------------------------------------------- data parallelism
def _in_ddp(platform):
    ranks = platform.world_size
    whole, model = _models(init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))
    spread = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, spread)
    data_parallel = DistributedDataParallel(model)
    _loss(data_parallel, _batch(platform.rank)).backward()
    wanted = _mean_gradients(whole, ranks)
    for name, p in model.named_parameters():
        _close(_full(p.grad) / ranks if name in spread else p.grad, wanted[name])


@pytest.mark.composes("DDP", "around the plain parameters, the experts ignored by name")
def test_ddp_around_spread_experts(two):
    two.run(_in_ddp)


# ---------------------------------------------------------------------------------------------------------- pipelines
PARTS = 4
SCHEDULES = {
    # A rank's stages: one after the other, in turns, and in the shape of a V.
    "1F1B": [[0], [1]],
    "Interleaved1F1B": [[0, 2], [1, 3]],
    "InterleavedZeroBubble": [[0, 2], [1, 3]],
    "ZBVZeroBubble": [[0, 3], [1, 2]],
    "DualPipeV": [[0, 3], [1, 2]],
}


def _piped(platform, kind):
    """Two stages (or four, two on a rank), and experts over the two ranks of each; whether there is such a schedule."""
    # Not above: it imports Triton, before Triton's own tests have asked for its interpreter.
    from torch.distributed.pipelining import PipelineStage, schedules

    if not hasattr(schedules, f"Schedule{kind}"):
        return False
    schedule, places = getattr(schedules, f"Schedule{kind}"), SCHEDULES[kind]
    count = sum(map(len, places))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    whole, model = _models(mesh["ep"], blocks=count)
    pp, ep = mesh.get_coordinate()
    group = mesh["pp"].get_group()
    stages = [PipelineStage(model[n], n, count, torch.device("cpu"), group=group) for n in places[pp]]
    loss = lambda y, target: (y - target).square().sum()  # noqa: E731
    run = schedule(stages if len(stages) > 1 or count > 2 else stages[0], PARTS, loss_fn=loss, scale_grads=False)
    x, target = _batch(ep, rows=3 * PARTS), _batch(ep, step=1, rows=3 * PARTS)
    first, last = 0 in places[pp], count - 1 in places[pp]
    losses = []
    run.step(*([x] if first else []), **({"target": target, "losses": losses} if last else {}))
    # Each rank's loss is that of its own batch; experts have the gradients of both.
    totals, gradients = [], []
    for part in range(2):
        totals.append(loss(whole(_batch(part, rows=3 * PARTS)), _batch(part, step=1, rows=3 * PARTS)))
        whole.zero_grad()
        totals[-1].backward()
        gradients.append({name: p.grad for name, p in whole.named_parameters()})
    if last:
        _close(sum(losses), totals[ep])
    for stage in places[pp]:
        for name, p in model[stage].named_parameters():
            wanted = [grads[f"{stage}.{name}"] for grads in gradients]
            _close(p.grad, sum(wanted) if isinstance(p, DTensor) else wanted[ep])
    return True


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.composes(
    "pipelines",
    "1F1B, interleaved 1F1B, interleaved zero bubble, ZBV, DualPipeV; experts over the ranks of each stage",
)
def test_pipelines(four, kind):
    if not all(four.run(_piped, kind)):
        pytest.skip(f"this PyTorch has no schedule {kind}")


# -------------------------------------------------------------------------------------- what is kept beside weights
def _averaged(platform):
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    whole, model = _models(mesh)
    wanted = {name: p.detach().clone() for name, p in whole.named_parameters()}
    average = AveragedModel(model, avg_fn=lambda mean, new, n: 0.75 * mean + 0.25 * new)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for step in range(3):
        average.update_parameters(model)
        if step:
            for name, p in model.named_parameters():
                wanted[name] = 0.75 * wanted[name] + 0.25 * _full(p.detach())
        _loss(model, _batch(platform.rank, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in average.module.named_parameters():
        _close(p.detach(), wanted[name])
    whole.load_state_dict(wanted)
    x = _batch(platform.rank, 9)
    _close(average(x).detach(), whole(x).detach())


@pytest.mark.composes(
    "averaged weights",
    "`AveragedModel` over plain parameters and DTensors together, with `avg_fn`",
)
def test_averaged_weights(two):
    two.run(_averaged)


def _averages_that_pytorch_refuses(platform):
    mesh = init_device_mesh("cpu", (1, platform.world_size), mesh_dim_names=("efsdp", "ep"))
    _, model = _models(mesh["ep"])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)  # the first one copies
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        average.update_parameters(model)
    hep.fully_shard(model, mesh, blocks="*")
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        AveragedModel(model)


@pytest.mark.composes(
    "averaged weights",
    "PyTorch's own limits, for any such model: `AveragedModel` after `fully_shard` is refused "
    '("FSDP does not support deepcopy"), and so is `get_ema_multi_avg_fn` over plain parameters '
    'and DTensors together ("got mixed torch.Tensor and DTensor")',
)
def test_averages_that_pytorch_refuses(two):
    two.run(_averages_that_pytorch_refuses)


def _resumed(platform, folder):
    """Trained over (2, 2) ranks of (efsdp, ep), saved, and resumed over (1, 4)."""
    kept = []
    for shape in ((2, 2), (1, 4)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep"))
        _, model = _models(mesh["ep"])
        hep.fully_shard(model, mesh, blocks="*")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if not kept:
            for step in range(2):
                _loss(model, _batch(platform.rank, step)).backward()
                optimizer.step()
                optimizer.zero_grad()
            dcp.save(dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
        else:
            state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        held = [
            (n, p, *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq"))) for n, p in model.named_parameters()
        ]
        kept.append({n: [_full(t.detach()) for t in tensors] for n, *tensors in held})
        # And the next step is the same.
        _loss(model, _batch(platform.rank, 5)).backward()
        optimizer.step()
        kept[-1] |= {f"{n}, then": [_full(p.detach())] for n, p in model.named_parameters()}
    assert kept[0].keys() == kept[1].keys()
    for name, tensors in kept[0].items():
        for one, other in zip(tensors, kept[1][name], strict=True):
            assert one.abs().sum() > 0, name
            torch.testing.assert_close(other, one, rtol=1e-9 if "then" in name else 0, atol=0, msg=name)


@pytest.mark.composes(
    "DCP", "weights and optimizer under `fully_shard`, saved over (2, 2) and resumed over (1, 4) ranks"
)
def test_resumed_over_another_grid(four, tmp_path):
    four.run(_resumed, str(tmp_path))


def _saved_meanwhile(platform, folder):
    """What is saved are the weights of the moment of the call, whatever is trained while they are written."""
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    whole, model = _models(mesh)
    own_group = dist.new_group(backend="gloo")
    saved = dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder, process_group=own_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=False)
    _loss(model, _batch(platform.rank)).backward()
    optimizer.step()
    saved.result()
    assert not torch.equal(_full(model[0].moe.experts.w1.detach()), whole[0].moe.experts.w1)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    for name, p in model.named_parameters():
        assert torch.equal(_full(p.detach()), whole.get_parameter(name)), name


@pytest.mark.composes("DCP", "`async_save` while training goes on, with a process group of its own")
def test_asynchronous_checkpoints(two, tmp_path):
    two.run(_saved_meanwhile, str(tmp_path))


def _whole_and_back(platform, sharded):
    """Whole weights that rank 0 has, into a model that has others, and out of it."""
    mesh = init_device_mesh("cpu", (1, platform.world_size), mesh_dim_names=("efsdp", "ep"))
    whole, model = _models(mesh["ep"], blocks=2)
    if sharded:
        hep.fully_shard(model, mesh, blocks="*")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = whole.state_dict() if platform.rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    for name, p in model.named_parameters():
        assert torch.equal(_full(p.detach()), whole.get_parameter(name)), name
    found = hep.full_state_dict(model)
    if platform.rank == 0:
        assert found.keys() == whole.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    else:
        assert not found


@pytest.mark.composes(
    "whole state dicts",
    "`hyperep_torch.full_state_dict`, and back by PyTorch's `set_model_state_dict` from rank 0, with and without "
    "`fully_shard`",
)
@pytest.mark.parametrize("sharded", [False, True], ids=["ep", "fully_shard"])
def test_whole_weights_and_back(two, sharded):
    two.run(_whole_and_back, sharded)


def _loaded_in_one_call(platform, sharded, stacked):
    """Rank 0 has the weights, and all models have them afterwards. What does not fit changes nothing."""
    mesh = init_device_mesh("cpu", (platform.world_size // 2, 2), mesh_dim_names=("efsdp", "ep"))
    whole, model = _models(mesh["ep"], blocks=2)
    if stacked:
        for m in (whole, model):
            for block in m:
                block.moe.experts = nn.ModuleList(nn.Linear(DIM, DIM).double() for _ in range(EXPERTS))
        for block in model:
            block.moe.experts = hep.stack_experts(block.moe.experts)
            hep.ExpertParallel().apply(block.moe.experts, mesh["ep"])
    if sharded:
        hep.fully_shard(model, mesh, blocks="*")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = whole.state_dict() if platform.rank == 0 else {}
    name = next(reversed(whole.state_dict()))
    for wrong in ({k: v for k, v in state.items() if k != name}, {**state, name: state.get(name, torch.ones(1))[:1]}):
        with pytest.raises(ValueError, match=f"{name}.*nothing was loaded"):
            hep.load_full_state_dict(model, wrong)
    assert not any(_full(p.detach()).any() for p in model.parameters())
    given = dict(state)
    hep.load_full_state_dict(model, state)
    assert all(state[name] is value for name, value in given.items())
    found = hep.full_state_dict(model)
    if platform.rank == 0:
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())


def _stack_read_from_the_list(platform):
    """PyTorch's call knows the stack's names alone; the module's own takes the list's, whole, on every rank."""
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    holder = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))})
    state = {name: value.clone() for name, value in holder.state_dict().items()}
    holder["experts"] = hep.stack_experts(nn.Linear(DIM, DIM) for _ in range(EXPERTS))
    hep.ExpertParallel().apply(holder["experts"], mesh)
    with pytest.raises(RuntimeError, match=r"loading state_dict.*\n.*experts\."):
        set_model_state_dict(holder, dict(state), options=StateDictOptions(full_state_dict=True))
    holder.load_state_dict(state)
    assert torch.equal(_full(holder["experts"].weight.detach())[3], state["experts.3.weight"])


@pytest.mark.composes(
    "whole state dicts",
    "stacked experts by `load_state_dict` with the list's names, the whole dict on every rank; PyTorch's "
    "`set_model_state_dict` does not read them",
)
def test_a_stack_read_from_the_list(two):
    two.run(_stack_read_from_the_list)


@pytest.mark.composes(
    "whole state dicts",
    "`hyperep_torch.load_full_state_dict` from rank 0, also of stacked experts under the list's names",
)
@pytest.mark.parametrize("stacked", [False, True], ids=["moe", "stacked"])
@pytest.mark.parametrize("sharded", [False, True], ids=["ep", "fully_shard"])
def test_whole_weights_loaded_in_one_call(two, sharded, stacked):
    two.run(_loaded_in_one_call, sharded, stacked)


@pytest.mark.parametrize("stacked", [False, True], ids=["moe", "stacked"])
def test_whole_weights_loaded_over_a_grid(four, stacked):
    four.run(_loaded_in_one_call, True, stacked)


# ----------------------------------------------------------------------------------------------------------- inference
def _uneven(platform):
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    whole, model = _models(mesh)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for step, rows in enumerate(([5, 0], [1, 7], [0, 0])):
                x = _batch(platform.rank, step, rows[platform.rank])
                _close(model.eval()(x), whole(x))


@pytest.mark.composes("inference", "`no_grad` and `inference_mode`, other numbers of tokens on each rank, also none")
def test_inference_with_other_tokens_on_each_rank(two):
    two.run(_uneven)


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.composes(
    "`torch.func`",
    "its transforms (`grad`, `vmap`, `jvp`) are refused, in PyTorch's words where no ranks are: "
    '"must override the setup_context staticmethod"',
)
def test_function_transforms_are_refused():
    layer = hep.MoE(DIM, 12, EXPERTS, 2)
    x = torch.randn(2, 5, DIM)
    with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
        torch.func.grad(lambda x: layer(x).sum())(x[0])
    for transform in (lambda: torch.func.vmap(layer)(x), lambda: torch.func.jvp(layer, (x[0],), (x[1],))):
        with pytest.raises(RuntimeError):
            transform()


PENALTIES = {
    # With and without an incoming gradient that depends on anything.
    "of a function": lambda model, x: model(x).sin().sum(),
    "of a sum": lambda model, x: model(x).sum(),
}


def _twice(platform, penalty):
    mesh = init_device_mesh("cpu", (platform.world_size,), mesh_dim_names=("ep",))
    for model in _models(mesh):
        x = _batch(platform.rank).requires_grad_()
        (gradient,) = torch.autograd.grad(PENALTIES[penalty](model, x), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative .*\(once_differentiable\)"):
            gradient.square().sum().backward()


@pytest.mark.composes(
    "second derivatives",
    "refused in words (`once_differentiable`), also of a sum, where PyTorch's own mark lets them pass for constants: "
    "exchanges and products have one written backward",
)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_second_derivative_is_refused(two, penalty):
    two.run(_twice, penalty)
