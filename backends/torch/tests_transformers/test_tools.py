# SPDX-License-Identifier: Apache-2.0
"""Stock models with their experts spread, and what transformers, accelerate and peft do with them."""

import cases
import lora
import pytest
import torch

MODEL = "qwen3_moe"


@pytest.mark.parametrize("model", ["qwen3_moe", "dbrx", "longcat_flash"])
def test_whole_weights(two, model):
    two.run(cases.whole_state, model)


def test_tied_weights(two, tmp_path):
    """Through the second door they are right; by transformers' FSDP2 wrong after a step, with whatever exchange."""
    for found in two.run(cases.tied, "ernie4_5_moe", str(tmp_path)):
        assert max(found["any model"]) < 1e-5
        assert max(found["hyperep"][0], found["all_to_all"][0]) < 1e-5
        assert min(found["hyperep"][1], found["all_to_all"][1]) > 1e-3


def test_experts_in_another_shape_are_not_read_by_owners(two, tmp_path):
    two.run(cases.refused_before_reading, "dbrx", str(tmp_path))


def test_hyperep_fully_shard(four):
    four.run(cases.fully_sharded, MODEL)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_over_all_ranks(two, padded):
    two.run(cases.balanced_globally, MODEL, padded)


@pytest.mark.composes(
    "LoRA",
    "peft's `target_parameters` on experts of transformers, before and after they are spread, frozen base or not",
)
@pytest.mark.parametrize(
    ("model", "order"),
    [("qwen3_moe", "before"), ("qwen3_moe", "after"), ("qwen3_moe", "base trained"), ("gpt_oss", "before")],
)
def test_lora_on_spread_experts(two, model, order, tmp_path):
    two.run(lora.with_lora_on_experts, model, order, str(tmp_path))


@pytest.mark.composes("LoRA", "the same on experts of your own, in both layouts, called with rows and with tokens")
@pytest.mark.parametrize("frozen", [True, False])
def test_lora_on_own_experts(two, frozen):
    two.run(lora.with_lora_on_own_experts, frozen)


@pytest.mark.composes("LoRA", "then `fully_shard` around both: every gradient is the mean over all data ranks")
def test_lora_on_experts_under_fully_shard(two):
    two.run(lora.with_lora_under_fully_shard)


def test_lora_on_experts_over_four_ranks(four, tmp_path):
    four.run(lora.with_lora_on_experts, MODEL, "before", str(tmp_path))


@pytest.mark.composes(
    "DCP", "weights and optimizer of stock models, saved at one number of ranks and resumed at another"
)
def test_resume_at_another_number_of_ranks(two, four, tmp_path):
    """Two steps at two ranks and two at four are four steps at two; both halves of the ranks have the same data."""
    two.run(cases.trained, MODEL, str(tmp_path / "checkpoint"))
    for ranks, name in ((two, "two"), (four, "four")):
        ranks.run(cases.resumed, MODEL, str(tmp_path / "checkpoint"), str(tmp_path / name))
    found, expected = (torch.load(tmp_path / name) for name in ("four", "two"))
    assert found.keys() == expected.keys()
    assert max(cases.relative(found[key], expected[key]) for key in expected) < 1e-4


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"max_grad_norm": 0.0}, 2e-3), ({"bf16": True}, 0.4)],
    ids=["no clipping", "bfloat16"],
)
def test_trainer(two, settings, tolerance, tmp_path):
    for found in two.run(cases.trained_otherwise, MODEL, settings, str(tmp_path)):
        assert max(found.values()) < tolerance, found


def test_inside_transformers_beside_tensor_parallelism(two, tmp_path):
    two.run(cases.shared_batch, MODEL, str(tmp_path))


def test_no_more_graph_breaks_than_with_the_exchange_of_transformers(two, tmp_path):
    theirs, inside, spread = two.run(cases.graph_breaks, str(tmp_path), deadline=250)[0]
    assert max(inside, spread) <= theirs
