# SPDX-License-Identifier: Apache-2.0
"""Weights that one framework has written and another one reads.

Frameworks live in environments of their own. So each writes a small safetensors file with its own writer; the files are
kept beside this module; and every framework's tests hold that it writes the same file today, and that with the weights
of each file, whoever wrote it, the layer gives what the NumPy reference gives.
"""

from __future__ import annotations

from pathlib import Path

import moe_reference as reference
import numpy as np
from measure import fill_weights, relative, rows
from safetensors.numpy import load_file

from hyperep.moe import MoEConfig, RouterConfig, build_moe

FILES = Path(__file__).parent / "written"
WRITERS = ("torch", "mindspore")
ROUTER = RouterConfig(num_experts=4, top_k=2, score_function="sigmoid", expert_bias=True)
CONFIG = MoEConfig(dim=4, hidden_dim=6, router=ROUTER)
SEEDS = {"torch": 11, "mindspore": 12}


def made(platform, writer):
    """The layer with the weights that *writer* writes, and an expert bias."""
    layer = build_moe(platform, CONFIG)
    fill_weights(platform, layer, SEEDS[writer])
    (bias,) = platform.buffers(layer).values()
    platform.assign(bias, platform.from_host((0.3 * rows(SEEDS[writer], 4)).astype(np.float32)))
    return layer


def kept(writer):
    """The arrays of the file that *writer* has written, by name."""
    return load_file(FILES / f"{writer}.safetensors")


def writes_what_is_kept(writer, path):
    """The file at *path*, written just now, holds what the kept one holds: names, dtypes, shapes, bits."""
    now, before = load_file(path), kept(writer)
    assert now.keys() == before.keys(), (sorted(now), sorted(before))
    for name, array in before.items():
        assert (now[name].dtype, now[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(now[name], array), name


def computes_with(platform, layer, writer):
    """*layer*, into which a kept file was loaded, gives what NumPy gives with the same weights."""
    weights = {name: array.astype(float) for name, array in kept(writer).items()}
    (bias,) = (weights.pop(name) for name in list(weights) if name.endswith("expert_bias"))
    x = rows(3, 9, 4)
    (found,) = platform.to_host(layer(platform.from_host(x.astype(np.float32))))
    expected, _, _ = reference.layer(x, weights, CONFIG, bias)
    assert relative(found, expected) < 1e-5, relative(found, expected)
    assert np.abs(found).max() > 0.1
