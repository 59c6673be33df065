# SPDX-License-Identifier: Apache-2.0
"""Dispatch, its errors and the permutation between real gloo processes: the core's neutral cases."""

import sys
from pathlib import Path

import pytest
from ranks import Ranks

from hyperep.platform.errors import RankFailure

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import bad_input_cases
import dispatch_cases
import permutation_cases


@pytest.mark.parametrize(("fixture", "experts"), [("two", 2), ("two", 4), ("four", 8), ("two", 262)])
def test_rows_arrive_where_they_should(request, fixture, experts):
    request.getfixturevalue(fixture).run(dispatch_cases.rows_arrive_where_they_should, experts)


@pytest.mark.parametrize(
    "case",
    [
        dispatch_cases.one_host_copy_per_dispatch,
        dispatch_cases.a_style_copies_once_for_any_number_of_experts,
        dispatch_cases.two_dispatches_in_flight,
        dispatch_cases.recompute_repeats_everything_alike,
        dispatch_cases.combine_takes_what_it_is_told,
    ],
)
def test_case(two, case):
    two.run(case)


@pytest.mark.parametrize("which", dispatch_cases.BAD_INPUT)
def test_bad_input_on_one_rank_raises_on_all(two, which):
    two.run(dispatch_cases.bad_input_on_one_rank_raises_on_all, which)


@pytest.mark.parametrize("which", dispatch_cases.DISAGREEMENTS)
def test_disagreement_on_experts_raises_on_all(two, which):
    two.run(dispatch_cases.disagreement_on_experts_raises_on_all, which)


def test_errors_name_world_ranks(four):
    four.run(dispatch_cases.errors_name_world_ranks)


@pytest.mark.parametrize("which", dispatch_cases.NOT_COMBINED)
def test_combine_refuses(two, which):
    two.run(dispatch_cases.combine_refuses, which)


def test_one_rank_that_breaks_the_contract_ends_the_run():
    ranks = Ranks(2)
    try:
        with pytest.raises(RankFailure, match=r"combine on rank 1: a row has shape \(6,\)") as raised:
            ranks.run(dispatch_cases.experts_that_break_the_contract_on_one_rank)
        assert raised.value.rank == 1
    finally:
        ranks.stop()


def _unusable(platform, which):
    """Rows or counts of another device or layout on rank 1: every rank hears of it, and the next dispatch works."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate

    import hyperep

    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    x, good = torch.ones(4, 3), torch.ones(4, dtype=torch.int64)
    spoil = {
        "rows on another device": lambda: (x.to("meta"), good),
        "counts on another device": lambda: (x, good.to("meta")),
        "sparse rows": lambda: (x.to_sparse(), good),
        "sparse counts": lambda: (x, good.to_sparse()),
        "rows that are distributed": lambda: (DTensor.from_local(x, native, [Replicate()], run_check=False), good),
    }[which]
    native = torch.distributed.device_mesh.init_device_mesh("cpu", (platform.world_size,))
    rows, counts = spoil() if platform.rank == 1 else (x, good)
    for experts in (4, None):
        with pytest.raises(TypeError, match=r"rank 1: .* dense and on its device cpu") as raised:
            hyperep.dispatch(rows, counts, mesh, num_experts=experts)
        told = {"rows on another": "rows is a torch.Tensor on meta", "sparse counts": "on cpu, torch.sparse_coo"}
        wanted = next((text for key, text in told.items() if which.startswith(key)), "")
        assert wanted in str(raised.value) or platform.rank == 0
    received, _, context = hyperep.dispatch(x, good, native)  # a mesh of PyTorch's own is taken as well
    assert torch.equal(hyperep.combine(received, context), x)


@pytest.mark.parametrize(
    "which",
    [
        "rows on another device",
        "counts on another device",
        "sparse rows",
        "sparse counts",
        "rows that are distributed",
    ],
)
def test_unusable_tensors_raise_on_all(two, which):
    two.run(_unusable, which)


@pytest.mark.parametrize("name", [*bad_input_cases.MESHES, *bad_input_cases.STYLES])
def test_bad_settings_raise_on_every_rank(two, name):
    two.run(bad_input_cases.raises_on_every_rank, name)


@pytest.mark.parametrize("name", bad_input_cases.UNLIKE)
def test_unlike_on_one_rank_raises_on_all(two, name):
    two.run(bad_input_cases.unlike_on_one_rank_raises_on_all, name)


def test_unlike_in_a_grid_raises_on_all(four):
    four.run(bad_input_cases.unlike_in_a_grid_raises_on_all)


def test_a_refused_style_changes_nothing(two):
    two.run(bad_input_cases.a_refused_style_changes_nothing)


@pytest.mark.parametrize(("num_ranks", "experts_per_rank"), permutation_cases.SHAPES)
def test_rows_and_gradients_agree_with_the_naive_way(platform, num_ranks, experts_per_rank):
    permutation_cases.rows_and_gradient_agree(platform, num_ranks, experts_per_rank)


def _checkpointed(platform):
    """PyTorch's own activation checkpointing: gradients as without it, one host copy for each of the two dispatches."""
    import torch
    from measure import counted, fill_weights, rows
    from torch.utils.checkpoint import checkpoint

    import hyperep
    from hyperep.moe import MoE

    layer = MoE(platform, 8, 6, 4, 2)
    fill_weights(platform, layer)
    mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))
    hyperep.ExpertParallel().apply(layer.experts, mesh)
    x = torch.from_numpy(rows(platform.rank, 10, 8)).requires_grad_()

    def gradients(call):
        layer.zero_grad()
        x.grad = None
        with counted(platform, "to_host") as calls:
            call().square().sum().backward()
        found = [x.grad, *(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters())]
        return [g.clone() for g in found], calls["to_host"]

    plain, copies = gradients(lambda: layer(x))
    again, copies_again = gradients(lambda: checkpoint(layer, x, use_reentrant=False))
    assert (copies, copies_again) == (1, 2)
    for value, wanted in zip(again, plain, strict=True):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing(two):
    two.run(_checkpointed)
