# SPDX-License-Identifier: Apache-2.0
"""The layer beside what a PyTorch user would otherwise pick: same weights, same data, results checked equal first.

    torchrun --standalone --nproc-per-node 2 benchmarks/compare.py torchtitan
    python benchmarks/compare.py transformers

in an environment with hyperep, hyperep-torch, and ``torchtitan==0.2.2 triton`` or ``transformers>=5``. Both compare the
routed layer, from tokens, choices and weights to tokens: the first one over all ranks, with torchtitan's
``ExpertParallel`` and ``GroupedExperts`` between its own expansion and weighted sum; the second one on one rank, with
the implementations of experts that transformers offers. Times are medians of repetitions that take turns, forward and
backward, in float32.

What is not compared on a CPU: torchtitan's grouped product, which casts float32 weights to bfloat16, so that its loop
over experts is taken; its index kernel, written for CUDA, in place of which its own reference for the CPU is taken; and
transformers' ``batched_mm``, which copies the weights once for each row, 6 to 17 GB at these shapes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.shapes import Shape, preset
from hyperep.bench.timing import interleaved
from hyperep.exchange.routed import routed_from_rows
from hyperep.mesh import DeviceMesh, init_device_mesh
from hyperep.styles import ExpertParallel

TOLERANCE = 1e-4
Step = Callable[[], list[torch.Tensor]]


def torchtitan_step(layer: Layer, mesh: DeviceMesh) -> Step:
    """Experts of torchtitan with the layer's weights; result, and gradients of tokens, their weights, w1, w2 and w3.

    Around them, what its MoE layer does without a shared expert: choices sorted by expert, tokens gathered, rows put
    back by choice, weighted in float32 and added up.
    """
    from torch.distributed.device_mesh import init_device_mesh as init_native_mesh
    from torchtitan.distributed.expert_parallel import ExpertParallel
    from torchtitan.models.moe import moe, utils

    # The CUDA kernel has a reference for the CPU beside it, which makes the same indices.
    utils.generate_permute_indices = functools.partial(utils.generate_permute_indices, use_cpu=True)
    data, shape = layer.data, layer.data.shape
    experts = moe.GroupedExperts(shape.dim, shape.hidden, shape.experts, use_grouped_mm=False)
    whole = data.expert_weights()
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(whole[name])
    ExpertParallel()._apply(experts, init_native_mesh("cpu", (mesh.size(),), mesh_dim_names=("ep",)))
    names = ("w1", "w2", "w3")
    x, weights = data.tokens.clone().requires_grad_(), data.weights.clone().requires_grad_()
    reorder = moe.TokenReorderer(num_experts=shape.experts, top_k=shape.top_k)

    def step() -> list[torch.Tensor]:
        _, order, counts = reorder(weights.detach(), data.choices.float())  # torch counts no integers on a CPU
        rows = experts(x[order // shape.top_k], counts.to(torch.int64))
        by_choice = torch.zeros_like(rows)
        by_choice[order] = rows
        by_choice = by_choice.reshape(data.count, shape.top_k, shape.dim)
        out = torch.bmm(weights[:, None].float(), by_choice.float()).to(x.dtype).squeeze(1)
        gradients = torch.autograd.grad(out, [x, weights, *(getattr(experts, n) for n in names)], data.cotangent)
        return [out.detach(), *gradients[:2], *(g.to_local() for g in gradients[2:])]

    return step


def hyperep_step(layer: Layer) -> Step:
    """The same of this project."""
    data, parameters = layer.data, [layer.parameters[n] for n in ("w1", "w2", "w3")]
    x, weights = data.tokens.clone().requires_grad_(), data.weights.clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        out = layer.experts(x, data.choices, weights)
        gradients = torch.autograd.grad(out, [x, weights, *parameters], data.cotangent)
        return [out.detach(), *gradients[:2], *(layer.platform.local(g) for g in gradients[2:])]

    return step


def transformers_steps(platform: Any, shape: Shape) -> dict[str, Step]:
    """All experts on one rank, from tokens and choices to tokens: transformers' ways and this project's."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    rng = torch.Generator().manual_seed(1)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=rng) * scale

    x, g = random(shape.tokens, shape.dim).requires_grad_(), random(shape.tokens, shape.dim)
    chosen = torch.from_numpy(shape.choices(0, 1))
    weights = torch.softmax(random(shape.tokens, shape.top_k), dim=1).requires_grad_()
    w1, w3 = (random(shape.experts, shape.hidden, shape.dim, scale=shape.dim**-0.5) for _ in range(2))
    w2 = random(shape.experts, shape.dim, shape.hidden, scale=shape.hidden**-0.5)
    sizes = {"hidden_size": shape.dim, "intermediate_size": shape.hidden}
    steps: dict[str, Step] = {}
    for way in ("eager", "grouped_mm"):
        config = MixtralConfig(**sizes, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k)
        config._experts_implementation = way
        experts = MixtralExperts(config)
        with torch.no_grad():
            experts.gate_up_proj.copy_(torch.cat([w1, w3], dim=1))
            experts.down_proj.copy_(w2)

        def step(experts: Any = experts) -> list[torch.Tensor]:
            out = experts(x, chosen, weights)
            of = [x, weights, experts.gate_up_proj, experts.down_proj]
            grad_x, grad_weights, grad_1_3, grad_2 = torch.autograd.grad(out, of, g)
            grad_1, grad_3 = grad_1_3.split(shape.hidden, dim=1)
            return [out.detach(), grad_x, grad_weights, grad_1, grad_2, grad_3]

        steps[f"transformers {way}"] = step
    own = [w.clone().requires_grad_() for w in (w1, w2, w3)]

    def own_step() -> list[torch.Tensor]:
        def by_row(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            return platform.grouped_swiglu(rows, *own, counts)

        out = routed_from_rows(platform, by_row, shape.experts)(x, chosen, weights, rows=shape.rows)
        return [out.detach(), *torch.autograd.grad(out, [x, weights, *own], g)]

    return {"hyperep": own_step, **steps}


def compare(platform: Any, name: str, steps: dict[str, Step], repetitions: int) -> dict[str, Any]:
    """Check that all steps agree with the first, then time them.

    Raises:
        ArithmeticError: one differs.
    """
    wanted = steps["hyperep"]()
    for other, step in steps.items():
        for i, (got, want) in enumerate(zip(step(), wanted, strict=True)):
            error = ((got - want).norm() / want.norm()).item()
            if not error < TOLERANCE:
                raise ArithmeticError(f"{name}: {other} differs from hyperep in result {i} by {error:.1e}")
    times = interleaved(platform, steps, repetitions)
    medians = {step: float(np.median(values)) for step, values in times.items()}
    return {
        "shape": name,
        "ranks": platform.world_size,
        "ms": medians,
        "times_hyperep": {step: ms / medians["hyperep"] for step, ms in medians.items()},
    }


def main() -> None:
    """Compare on the shapes asked for, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=("torchtitan", "transformers"))
    parser.add_argument("--shape", action="append", help="a preset of hyperep bench (repeatable)")
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from hyperep_torch.platform import join

    platform = join(device="cpu")
    for name in arguments.shape or ("coarse", "fine", "finest"):
        shape = preset(name)
        if arguments.package == "torchtitan":
            mesh = init_device_mesh(platform, (platform.world_size,), ("ep",))
            layer = Layer(Data(platform, shape, platform.rank), mesh, ExpertParallel())
            steps = {"hyperep": hyperep_step(layer), "torchtitan": torchtitan_step(layer, mesh)}
        else:
            steps = transformers_steps(platform, shape)
        found = compare(platform, name, steps, arguments.repetitions)
        if platform.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
