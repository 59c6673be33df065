# SPDX-License-Identifier: Apache-2.0
"""A native MindSpore model whose experts are sharded, trained with MindSpore's own optimizer.

Run it with: msrun --worker_num=2 --local_worker_num=2 --master_port=8118 --join=True train_moe.py
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

import hyperep
from hyperep.moe import MoE

platform = hyperep.get_platform("mindspore")  # joins msrun's launch, or communication that you have set up
mesh = hyperep.init_device_mesh(platform, (platform.world_size,), ("ep",))


class Model(nn.Cell):
    """Two dense layers of MindSpore's, and a mixture of experts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Dense(32, 64, weight_init="normal")
        self.moe = MoE(platform, dim=64, hidden_dim=128, num_experts=8, top_k=2)  # an nn.Cell
        self.down = nn.Dense(64, 32, weight_init="normal")

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """``[T, 32] -> [T, 32]``."""
        hidden = ops.tanh(self.up(x))
        return self.down(hidden + self.moe(hidden))


ms.set_seed(0)  # replicated weights begin equal on all ranks
model = Model()
hyperep.ExpertParallel().apply(model.moe.experts, mesh)  # its parameters are this rank's experts now

optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=3e-3)
data = np.random.default_rng(1 + platform.rank)  # every rank has tokens of its own
target = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32) / 6


def loss_of(tokens: ms.Tensor, wanted: ms.Tensor) -> ms.Tensor:
    """This rank's part of the global mean."""
    return ops.sum((model(tokens) - wanted) ** 2) / (tokens.size * platform.world_size)


step = ms.value_and_grad(loss_of, None, optimizer.parameters)
for i in range(20):
    tokens = data.normal(size=(128, 32)).astype(np.float32)
    loss, gradients = step(ms.Tensor(tokens), ms.Tensor(np.tanh(tokens @ target)))
    # An expert's gradient is complete already; those of replicated parameters are summed over the ranks.
    gradients = tuple(
        gradient if platform.sharding(parameter) else platform.all_reduce(gradient)
        for parameter, gradient in zip(optimizer.parameters, gradients, strict=True)
    )
    optimizer(gradients)
    loss = platform.all_reduce(loss)
    if platform.rank == 0:
        print(i, model.moe.experts.w1.shape, float(loss), flush=True)
