# SPDX-License-Identifier: Apache-2.0
"""Weights between frameworks: what PyTorch writes, and what it makes of the files of others."""

import sys
from pathlib import Path

import pytest

# Ranks look for programs where their parent does.
sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import weights_between
from measure import fill_weights
from safetensors.torch import load_file, save_file

from hyperep.moe import build_moe


def test_the_kept_file_is_what_torch_writes(platform, tmp_path):
    path = tmp_path / "layer.safetensors"
    save_file(weights_between.made(platform, "torch").state_dict(), path)
    weights_between.writes_what_is_kept("torch", path)


@pytest.mark.parametrize("writer", weights_between.WRITERS)
def test_weights_that_another_framework_has_written(platform, writer):
    layer = build_moe(platform, weights_between.CONFIG)
    fill_weights(platform, layer, seed=99)
    layer.load_state_dict(load_file(weights_between.FILES / f"{writer}.safetensors"), strict=True)
    weights_between.computes_with(platform, layer, writer)
