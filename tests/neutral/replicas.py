# SPDX-License-Identifier: Apache-2.0
"""What ranks hold in common stays common through training, to the bit. Runs on every platform."""

import zlib

import numpy as np

from hyperep.train import whole_state
from hyperep.train.batches import global_batch
from hyperep.train.parallel import sharded_dimensions
from hyperep.train.precision import choose_dtype
from hyperep.train.settings import Settings
from hyperep.train.trainer import new_state, train_step

SETTINGS = {"dim": 16, "experts": 4, "heads": 2, "seq_len": 16, "batch_tokens": 64, "warmup_steps": 1, "lr": 1e-2}
STEPS = 3
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def training_keeps_replicas_equal(platform, style="ep", tp=1, dtype="auto"):
    """After some steps of the training program: the same bits on all ranks, and the values of an unsharded run.

    Every rank trains the unsharded model too, from its own initial weights.
    """
    settings = Settings(**SETTINGS, style=style, tp=tp, dtype=dtype)
    state, alone = new_state(platform, settings), new_state(platform, settings, unsharded=True)
    text = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    for step in range(STEPS):
        batch = global_batch(text, seed=0, step=step, sequences=settings.sequences, seq_len=settings.seq_len)
        state, _ = train_step(platform, settings, state, batch)
        alone, _ = train_step(platform, settings, alone, batch)
    require_equal_replicas(platform, state.parameters, STEPS)
    found, expected = whole_state.gather(platform, state), whole_state.gather(platform, alone)
    tolerance = TOLERANCE[choose_dtype(platform, settings.dtype)]
    for kind in found:  # on rank 0
        for name, tensor in found[kind].items():
            scale = np.abs(expected[kind][name]).max()
            deviation = np.abs(tensor - expected[kind][name]).max() / scale
            assert deviation < tolerance, f"{kind} of {name} is {deviation:.1e} from the unsharded run's"


def require_equal_replicas(platform, parameters, step):
    """Compare the bits of each parameter between the ranks that hold the same part of it. Collective."""
    for name, parameter in parameters.items():
        sharding = platform.sharding(parameter)
        part = 0
        for dimension in sorted(sharded_dimensions(sharding)):
            part = part * 1000 + sharding.mesh.get_local_rank(dimension)
        local = platform.to_host(platform.local(parameter))[0]
        mine = np.array([[part, zlib.crc32(np.ascontiguousarray(local).tobytes())]], np.int64)
        (everyone,) = platform.to_host(platform.all_gather(platform.from_host(mine)))
        kinds = {(place, bits) for place, bits in everyone.tolist()}
        parts = {place for place, _ in kinds}
        assert len(kinds) == len(parts), f"{name} differs between ranks after {step} steps: {everyone.tolist()}"
