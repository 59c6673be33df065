# SPDX-License-Identifier: Apache-2.0
"""Which kernels OpenBLAS, which multiplies NumPy's matrices, has chosen for this processor; and better ones.

OpenBLAS chooses when it is loaded, by the model number of the processor. The one in NumPy 1.26, which MindSpore needs,
is of 2023 and takes an Intel processor that is newer for the oldest one that it knows: its kernels use vectors of 128
bits, and products take four to five times as long. ``OPENBLAS_CORETYPE`` chooses instead, if it is set before.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection

import numpy as np
import threadpoolctl

__all__ = ["VARIABLE", "better_kernels", "kernels_for", "warn_of_slow_kernels"]

VARIABLE = "OPENBLAS_CORETYPE"
_OLDEST = "Prescott"


def kernels_for(chosen: Collection[str], features: Collection[str]) -> str | None:
    """The name of better kernels, if there are any.

    Args:
        chosen: names of the kernels that the process's copies of OpenBLAS have chosen.
        features: of the processor, as NumPy names them.
    """
    if _OLDEST not in chosen:
        return None
    if "AVX512_SKX" in features:
        return "SkylakeX"
    return "Haswell" if {"AVX2", "FMA3"} <= set(features) else None


def better_kernels() -> str | None:
    """The name of better kernels than those that NumPy's products have in this process, if there are any."""
    if VARIABLE in os.environ:
        return None
    chosen = [library.get("architecture", "") for library in threadpoolctl.threadpool_info()]
    # NumPy leaves out what is empty: a processor that has no more than NumPy takes for granted has no "found".
    features = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    return kernels_for(chosen, features)


def warn_of_slow_kernels() -> None:
    """Say how to get better kernels, if there are any; too late for this process."""
    name = better_kernels()
    if name is not None:
        warnings.warn(
            f"NumPy's OpenBLAS does not know this processor and takes it for a {_OLDEST}, so that experts on the CPU "
            f"take several times as long; start the program with {VARIABLE}={name} (hyperep's own launcher does)",
            RuntimeWarning,
            stacklevel=3,
        )
