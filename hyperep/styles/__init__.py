# SPDX-License-Identifier: Apache-2.0
"""Parallel styles: partition the experts' parameters, then wrap their forward.

Every style is applied to a module of experts that is called as ``experts(rows, tokens_per_expert)``: rows sorted by
expert, and a count for each expert. :func:`hyperep.moe.GroupedExperts` makes one; a module of your own will do if the
first dim of each of its parameters is the expert.

Gradient scale, for all styles: the gradient of an expert is the **sum** over the rows that reached it, from all ranks
of the mesh. If the loss is a mean over the tokens of all ranks, divide each rank's loss by the global number of
tokens (sum the gradients of replicated parameters over the mesh, and leave those of experts alone). If instead each
rank's loss is a mean over its own tokens, and data parallelism averages the replicated gradients over ``R`` ranks,
then divide the experts' gradients by ``R`` too.
"""

from hyperep.styles.checks import UnlikeWeights
from hyperep.styles.expert import ExpertParallel
from hyperep.styles.expert_base import BaseExpertParallel
from hyperep.styles.expert_tensor import ExpertTensorParallel
from hyperep.styles.identity import StaleParameters
from hyperep.styles.linear import ColwiseParallel, RowwiseParallel
from hyperep.styles.parallelize import parallelize_module
from hyperep.styles.style import ParallelStyle
from hyperep.styles.tensor import TensorParallel

__all__ = [
    "BaseExpertParallel",
    "ColwiseParallel",
    "ExpertParallel",
    "ExpertTensorParallel",
    "ParallelStyle",
    "RowwiseParallel",
    "StaleParameters",
    "TensorParallel",
    "UnlikeWeights",
    "parallelize_module",
]
