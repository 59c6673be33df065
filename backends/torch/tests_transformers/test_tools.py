# SPDX-License-Identifier: Apache-2.0
"""Stock models with their experts spread, and what transformers, accelerate and peft do with them."""

import cases
import numpy as np
import pytest
import torch

MODEL = "qwen3_moe"


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_inside_transformers(two, model, tmp_path):
    two.run(cases.through_transformers, model, str(tmp_path))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.composes("recompute", "stock models of transformers, reentrant and not")
def test_gradient_checkpointing(two, reentrant):
    two.run(cases.recomputed, MODEL, reentrant)


@pytest.mark.composes("inference", "`generate` of stock models with prompts of different lengths")
def test_prompts_of_different_lengths(two):
    two.run(cases.generated, MODEL)


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss", "mixtral", "dbrx", "jetmoe", "llama4_text", "longcat_flash"])
def test_stock_transformers_reads_what_is_saved(two, model, tmp_path):
    two.run(cases.saved_and_loaded, model, str(tmp_path))


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_ranks_read_their_own_experts(ranks, model, tmp_path):
    ranks.run(cases.read_by_owners, model, str(tmp_path))


def test_experts_in_another_shape_are_not_read_by_owners(two, tmp_path):
    two.run(cases.refused_before_reading, "dbrx", str(tmp_path))


def test_hyperep_fully_shard(four):
    four.run(cases.fully_sharded, MODEL)


@pytest.mark.parametrize("padded", [False, True])
def test_balance_over_all_ranks(two, padded):
    two.run(cases.balanced_globally, MODEL, padded)


@pytest.mark.composes("LoRA", "beside frozen, spread experts")
def test_lora_beside_spread_experts(two, tmp_path):
    two.run(cases.with_lora, MODEL, str(tmp_path))


@pytest.mark.composes(
    "LoRA",
    "peft's `target_parameters` on experts of transformers, before and after they are spread, frozen base or not",
)
@pytest.mark.parametrize(
    ("model", "order"),
    [("qwen3_moe", "before"), ("qwen3_moe", "after"), ("qwen3_moe", "base trained"), ("gpt_oss", "before")],
)
def test_lora_on_spread_experts(two, model, order, tmp_path):
    two.run(cases.with_lora_on_experts, model, order, str(tmp_path))


@pytest.mark.composes("LoRA", "the same on experts of your own, in both layouts, called with rows and with tokens")
@pytest.mark.parametrize("frozen", [True, False])
def test_lora_on_own_experts(two, frozen):
    two.run(cases.with_lora_on_own_experts, frozen)


@pytest.mark.composes("LoRA", "then `fully_shard` around both: every gradient is the mean over all data ranks")
def test_lora_on_experts_under_fully_shard(two):
    two.run(cases.with_lora_under_fully_shard)


def test_lora_on_experts_over_four_ranks(four, tmp_path):
    four.run(cases.with_lora_on_experts, MODEL, "before", str(tmp_path))


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


CASES = {
    "clipping": ({"max_grad_norm": 0.5}, 1e-4),
    "no clipping": ({"max_grad_norm": 0.0}, 1e-4),
    "bfloat16": ({"max_grad_norm": 0.5, "bf16": True}, 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.composes("stock models", "transformers' `Trainer`, with clipping and accumulation")
def test_trainer(two, case, tmp_path):
    """Its steps, with accumulation, are those that it makes with the whole model; so are its losses and norms."""
    settings, tolerance = CASES[case]
    whole, spread = (two.run(cases.by_trainer, MODEL, str(tmp_path), kind, settings)[0] for kind in (False, True))
    np.testing.assert_allclose(spread["losses"], whole["losses"], rtol=tolerance)
    np.testing.assert_allclose(spread["norms"], whole["norms"], rtol=tolerance)
    assert spread["weights"].keys() == whole["weights"].keys()
    for key, expected in whole["weights"].items():
        assert np.abs(spread["weights"][key] - expected).max() <= tolerance * np.abs(expected).max(), key


def test_inside_transformers_beside_tensor_parallelism(two, tmp_path):
    two.run(cases.shared_batch, MODEL, str(tmp_path))


def test_no_more_graph_breaks_than_with_the_exchange_of_transformers(two, tmp_path):
    theirs, inside, spread = two.run(cases.graph_breaks, str(tmp_path), deadline=250)[0]
    assert max(inside, spread) <= theirs
