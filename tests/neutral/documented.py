# SPDX-License-Identifier: Apache-2.0
"""A documented training program, run as written on every rank, and the parameters that it ends with.

As a program, in place of the documented one under a framework's own launcher::

    LAUNCHER documented.py PROGRAM.py NAME DIRECTORY

runs PROGRAM.py and then writes to DIRECTORY what this rank holds of the model that PROGRAM.py calls NAME.
"""

import runpy
import sys
from pathlib import Path

import numpy as np


def save(platform, model, directory):
    """Write this rank's part of every parameter; those that no style has sharded under ``replicated/``."""
    parameters = platform.parameters(model)
    parts = platform.to_host(*(platform.local(parameter) for parameter in parameters.values()))
    kinds = ["sharded" if platform.sharding(p) else "replicated" for p in parameters.values()]
    arrays = {f"{kind}/{name}": part for kind, name, part in zip(kinds, parameters, parts, strict=True)}
    np.savez(Path(directory) / f"rank{platform.rank}.npz", **arrays)


def check(directory, ranks, unsharded, tolerance):
    """Compare what *ranks* ranks have saved with each other and with an unsharded run.

    Replicated parameters must be equal on all ranks, to the bit. They and the parts of the sharded ones, one after the
    other along dim 0, must be those of *unsharded* (whole arrays by path) but for a relative *tolerance*.
    """
    saved = [dict(np.load(Path(directory) / f"rank{rank}.npz")) for rank in range(ranks)]
    assert {key.split("/", 1)[1] for key in saved[0]} == set(unsharded)
    assert len({key.split("/", 1)[0] for key in saved[0]}) == 2, "nothing is replicated, or nothing is sharded"
    for key, first in saved[0].items():
        kind, name = key.split("/", 1)
        parts = [arrays[key] for arrays in saved]
        if kind == "replicated":
            for rank, part in enumerate(parts):
                assert part.tobytes() == first.tobytes(), (
                    f"{name} differs on rank {rank} by {np.abs(part - first).max()}"
                )
        whole = first if kind == "replicated" else np.concatenate(parts)
        expected = unsharded[name]
        assert whole.shape == expected.shape, (name, whole.shape, expected.shape)
        deviation = np.abs(whole - expected).max() / np.abs(expected).max()
        assert deviation < tolerance, f"{name} is {deviation:.1e} from the unsharded run's"


if __name__ == "__main__":
    program, name, directory = sys.argv[1:]
    sys.argv = [program]
    namespace = runpy.run_path(program, run_name="__main__")
    save(namespace["platform"], namespace[name], directory)
