# SPDX-License-Identifier: Apache-2.0
"""The core uses on tensors and on ``xp`` what is declared in ``hyperep.platform.array_subset``, and nothing else."""

import ast
from pathlib import Path

import moe_cases
import numpy as np
import pytest
from strict import StrictPlatform, StrictTensor

import hyperep
from hyperep import moe
from hyperep.exchange.tokens import join_choices
from hyperep.moe import LossCoefficients, build_moe
from hyperep.moe.scores import at_least_float32
from hyperep.platform.array_subset import ARRAY_DTYPES, ARRAY_FUNCTIONS
from hyperep.platform.base import PlatformBase

PACKAGE = Path(hyperep.__file__).parent


def test_only_declared_names_of_the_namespace_are_used():
    declared = {*ARRAY_FUNCTIONS, *ARRAY_DTYPES, "float16", "bfloat16", "float64"}
    used = {}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("loopback", "conformance"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                base = node.value
                name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
                if name == "xp":
                    used.setdefault(node.attr, path.name)
    assert {"take", "argsort", "matmul"} <= set(used)
    assert not set(used) - declared, {name: used[name] for name in set(used) - declared}


@pytest.mark.parametrize("name", moe_cases.CONFIGS)
@pytest.mark.parametrize(("tokens", "padded"), [(9, False), (0, False), (9, True)])
def test_layers_and_losses_use_only_what_tensors_are_declared_to_have(name, tokens, padded):
    platform = StrictPlatform()
    layer = build_moe(platform, moe_cases.CONFIGS[name])
    mesh = hyperep.init_device_mesh(platform, (1, 1), ("ep", "tp"))
    hyperep.ExpertTensorParallel().apply(platform.named_modules(layer)["experts"], mesh)
    x = platform.from_host(np.random.default_rng(0).normal(size=(3, tokens // 3, moe_cases.DIM)).astype(np.float32))
    mask = platform.from_host(np.arange(tokens).reshape(3, tokens // 3) % 3 > 0) if padded else None
    out, stats = layer(x, mask=mask, with_stats=True)
    coefficients = LossCoefficients(batch=1.0, sequence=1.0, global_batch=1.0, z=1.0)
    values = [
        out,
        moe.auxiliary_loss(platform, stats.routing, coefficients, sequences=stats.sequences, mesh=mesh["ep"]),
        moe.load_imbalance(platform, stats.tokens_per_expert),
        moe.dropped_fraction(platform, stats.tokens_per_expert, stats.dropped_per_expert),
    ]
    assert all(isinstance(value, StrictTensor) for value in values)
    if platform.buffers(layer):
        moe.update_expert_bias(platform, layer, stats.tokens_per_expert, 0.1)


def test_dtypes_are_compared_with_dtypes_alone_where_the_platform_lacks_one():
    platform = StrictPlatform()
    assert not hasattr(platform.xp, "float64")
    whole = platform.from_host(np.arange(6).reshape(3, 2))
    index = platform.from_host(np.array([[2], [0], [1]]))
    inverse = platform.from_host(np.array([1, 2, 0]))
    weights = platform.from_host(np.ones((3, 1), np.float32))
    made = [
        PlatformBase.sum_rows(platform, whole, index, inverse),
        PlatformBase.reduce_scatter(platform, whole),
        at_least_float32(platform, whole),
        join_choices(platform, index, weights),
    ]
    want = [np.arange(6).reshape(3, 2)[[2, 0, 1]], np.arange(6).reshape(3, 2), np.arange(6.0).reshape(3, 2)]
    for got, values in zip(made, [*want, np.array([[1.0, 2.0], [1.0, 0.0], [1.0, 1.0]])], strict=True):
        (host,) = platform.to_host(got)
        np.testing.assert_array_equal(host, values)


@pytest.mark.parametrize("style", [hyperep.ColwiseParallel, hyperep.RowwiseParallel])
def test_linear_styles_read_parameters_through_the_platform(style):
    platform = StrictPlatform()
    weight = platform.from_host(np.arange(6, dtype=np.float32).reshape(2, 3))
    linear = platform.make_module("Linear", {"weight": weight}, lambda m, x: platform.xp.matmul(x, m.weight))
    style().apply(linear, hyperep.init_device_mesh(platform, (1,), ("tp",)))
    assert platform.sharding(platform.parameters(linear)["weight"]) is not None
