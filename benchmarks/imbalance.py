# SPDX-License-Identifier: Apache-2.0
"""How much longer layers take under uneven loads than under an even one, here and in what else PyTorch users may pick.

    torchrun --standalone --nproc-per-node 2 benchmarks/imbalance.py torchtitan
    python benchmarks/imbalance.py transformers

in the environments of ``compare.py``, where the layers come from, and which says what of them is compared.
The workloads are those of :mod:`hyperep.workloads`; all of them, and all implementations, take turns. Results are
checked equal first. ``times_uniform`` is an implementation's median over its own under the workload ``uniform``. On
one rank, as for transformers, nobody waits for a fuller rank: what is left is what uneven groups of rows cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import Any

import numpy as np
import torch
from compare import TOLERANCE, Step, hyperep_step, torchtitan_step, transformers_steps

from hyperep.bench.data import Data
from hyperep.bench.layer import Layer
from hyperep.bench.shapes import Shape, preset
from hyperep.bench.timing import interleaved
from hyperep.mesh import init_device_mesh
from hyperep.styles import ExpertParallel
from hyperep.workloads import NAMES

_OF_SEVERAL_RANKS = ("hot-rank", "idle-rank")
"""What on one rank is the workload ``uniform``."""


def steps_of(package: str, platform: Any, shape: Shape) -> dict[str, Step]:
    """The implementations of a shape, by name; this project's first."""
    if package == "transformers":
        return transformers_steps(platform, shape)
    mesh = init_device_mesh(platform, (platform.world_size,), ("ep",))
    layer = Layer(Data(platform, shape, platform.rank), mesh, ExpertParallel())
    return {"hyperep": hyperep_step(layer), "torchtitan": torchtitan_step(layer, mesh)}


def check(steps: dict[str, Step], name: str) -> None:
    """Compare results and gradients with this project's.

    Raises:
        ArithmeticError: one differs.
    """
    wanted = steps["hyperep"]()
    for other, step in steps.items():
        for i, (got, want) in enumerate(zip(step(), wanted, strict=True)):
            error = (got - want).norm().item() / max(want.norm().item(), 1e-30)
            if not error < TOLERANCE:
                raise ArithmeticError(f"{name}: {other} differs from hyperep in result {i} by {error:.1e}")


def measure(package: str, platform: Any, shape: Shape, names: list[str], repetitions: int) -> list[dict[str, Any]]:
    """A record for each workload."""
    contestants: dict[tuple[str, str], Step] = {}
    for name in names:
        steps = steps_of(package, platform, dataclasses.replace(shape, workload=name))
        check(steps, name)
        contestants |= {(name, implementation): step for implementation, step in steps.items()}
    times = interleaved(platform, contestants, repetitions)
    medians = {key: float(np.median(values)) for key, values in times.items()}
    found = []
    for name in names:
        ms = {implementation: value for (of, implementation), value in medians.items() if of == name}
        record: dict[str, Any] = {"shape": shape.name, "ranks": platform.world_size, "workload": name, "ms": ms}
        if "uniform" in names:
            record["times_uniform"] = {way: value / medians["uniform", way] for way, value in ms.items()}
        found.append(record)
    return found


def main() -> None:
    """Measure the shapes asked for, and print a line of JSON for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=("torchtitan", "transformers"))
    parser.add_argument("--shape", action="append", help="a preset of hyperep bench (repeatable)")
    parser.add_argument("--workload", action="append", choices=NAMES, help="repeatable; all, if left out")
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from hyperep_torch.platform import join

    platform = join(device="cpu")
    names = arguments.workload or [n for n in NAMES if platform.world_size > 1 or n not in _OF_SEVERAL_RANKS]
    for name in arguments.shape or ("fine",):
        for record in measure(arguments.package, platform, preset(name), names, arguments.repetitions):
            if platform.rank == 0:
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
