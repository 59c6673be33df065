# SPDX-License-Identifier: Apache-2.0
"""Styles against the unsharded layer between real ranks, and alone: the core's neutral cases."""

import chunk_cases
import parity
import pytest

DEADLINE = 240.0
STYLED_GRID = [("ep", 2, 1), ("ep", 4, 1), ("tp", 1, 2), ("tp", 1, 4), ("etp", 1, 2), ("etp", 2, 1), ("etp", 2, 2)]
REDUCING = [("tp", 1, 2), ("etp", 1, 2)]


def _run(ranks, case, **arguments):
    return ranks.run(f"parity:{case}", arguments, deadline=DEADLINE)


@pytest.mark.parametrize(("style", "ep", "tp"), STYLED_GRID)
def test_sharded_layer_agrees_with_the_unsharded(request, style, ep, tp):
    ranks = request.getfixturevalue({2: "two", 4: "four"}[ep * tp])
    _run(ranks, "sharded_layer_agrees", style=style, ep=ep, tp=tp)


@pytest.mark.parametrize("style", ["ep", "tp", "etp"])
def test_sharded_over_one_rank(platform, style):
    parity.sharded_layer_agrees(platform, style, 1, 1)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
@pytest.mark.parametrize("case", ["backward_reduction_is_needed", "forward_reduction_is_needed"])
def test_a_removed_reduction_is_noticed(two, case, style, ep, tp):
    _run(two, case, style=style, ep=ep, tp=tp)


@pytest.mark.parametrize(("style", "ep", "tp"), REDUCING)
def test_partial_output_sums_to_the_whole(two, style, ep, tp):
    _run(two, "partial_output_sums_to_the_whole", style=style, ep=ep, tp=tp)


def test_one_style_serves_two_layers(ranks):
    _run(ranks, "one_style_serves_two_layers")


def test_a_layer_of_a_published_model_agrees(four):
    _run(four, "configured_layer_agrees", style="plan", ep=2, tp=2, config="deepseek-v3")


@pytest.mark.parametrize(("style", "ep", "tp", "chunks"), parity.IN_CHUNKS)
def test_layers_in_chunks_agree(request, style, ep, tp, chunks):
    case = {"style": style, "ep": ep, "tp": tp, "config": "deepseek-v3", "chunks": chunks}
    _run(request.getfixturevalue({2: "two", 4: "four"}[ep * tp]), "configured_layer_agrees", **case)


@pytest.mark.parametrize("case", chunk_cases.CASES)
def test_layers_in_chunks(two, case):
    two.run(f"chunk_cases:{case.__name__}", {}, deadline=DEADLINE)


def bad_input(platform):
    """The core's cases of bad input to dispatch and combine, one after the other: the ranks stay in step."""
    import bad_input_cases
    import dispatch_cases

    dispatch_cases.all_bad_input(platform)
    for name in bad_input_cases.UNLIKE:
        bad_input_cases.unlike_on_one_rank_raises_on_all(platform, name)
    if platform.world_size == 4:
        bad_input_cases.unlike_in_a_grid_raises_on_all(platform)


def partitions(platform):
    """The core's cases of buffers and fused weights."""
    import style_cases

    for style in ("ep", "tp", "etp"):
        if style != "tp" or platform.world_size == 2:  # 6 features
            style_cases.buffers_of_experts_are_split(platform, style)
    if platform.world_size == 2:
        style_cases.buffers_that_cannot_be_decided_are_refused(platform)
    for style in ("tp", "etp"):
        for layout in ("packed", "interleaved"):
            style_cases.fused_weights_agree_with_the_whole(platform, style, layout, biased=layout == "packed")
    style_cases.tensor_parallel_reaches_modules_below(platform)
    style_cases.ties_are_kept(platform)
    style_cases.ties_that_cannot_be_kept_are_refused(platform)
    style_cases.attributes_of_parameters_are_kept(platform)


def test_buffers_and_fused_weights(ranks):
    ranks.run("test_parity:partitions", {}, deadline=DEADLINE)


def test_whole_parameters_that_live_on_are_told(platform):
    import style_cases

    style_cases.whole_parameters_that_live_on_are_told(platform)


def test_bad_input_on_one_rank_raises_on_all(ranks):
    ranks.run("test_parity:bad_input", {}, deadline=DEADLINE)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("world", "style", "tp"), [("two", "ep", 1), ("four", "etp", 2)])
def test_training_keeps_replicas_equal(request, world, style, tp, dtype):
    arguments = {"style": style, "tp": tp, "dtype": dtype}
    ranks = request.getfixturevalue(world)
    ranks.run("replicas:training_keeps_replicas_equal", arguments, deadline=DEADLINE)
