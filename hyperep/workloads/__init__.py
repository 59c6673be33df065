# SPDX-License-Identifier: Apache-2.0
"""Eight routings by name, to compare how layers of experts bear load that is not even.

A pure function of name, sizes, seed, step and rank, in NumPy alone: the same choices for every framework and project.

>>> from hyperep.workloads import choices, counts
>>> choices("zipf", tokens=2048, experts=64, top_k=6, ranks=4, rank=0, seed=0, step=0).shape
(2048, 6)
>>> counts("hot-expert", tokens=2048, experts=64, top_k=6, ranks=4).sum(axis=1).tolist()  # choices of each rank
[12288, 12288, 12288, 12288]
"""

from hyperep.workloads.named import NAMES, WORKLOADS, choices, counts
from hyperep.workloads.trace import Trace, read_trace, recorded, write_trace

__all__ = ["NAMES", "WORKLOADS", "Trace", "choices", "counts", "read_trace", "recorded", "write_trace"]
