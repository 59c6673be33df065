# SPDX-License-Identifier: Apache-2.0
"""One step of training, told once: the same for a model that is spread over ranks and for one that is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hyperep.platform.protocol import Module, Parameter, Platform
from hyperep.train import optimizer
from hyperep.train.batches import own_part
from hyperep.train.gradients import clip_scale, global_norm, sum_gradients
from hyperep.train.loss import cross_entropy, imbalance_loss
from hyperep.train.model import LanguageModel
from hyperep.train.optimizer import Moments
from hyperep.train.parallel import Parallel, parallelize
from hyperep.train.precision import choose_dtype, in_precision
from hyperep.train.settings import Settings

__all__ = ["StepResult", "TrainState", "new_state", "train_step"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainState:
    """A model in training, after ``step`` steps."""

    model: Module
    parallel: Parallel
    parameters: dict[str, Parameter]
    moments: Moments
    step: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What a step found, over all ranks, on the host."""

    loss: float
    """Mean cross entropy of the global batch, in nats per byte, before the update."""
    gradient_norm: float
    """Before clipping."""
    expert_load: np.ndarray
    """int64 ``[layers, E]``: rows that each expert got."""


def new_state(platform: Platform[Any], settings: Settings, *, unsharded: bool = False) -> TrainState:
    """A model with its initial weights, spread over the world (collective), or whole on the calling rank."""
    model = LanguageModel(in_precision(platform, choose_dtype(platform, settings.dtype)), settings)
    parallel = Parallel() if unsharded else parallelize(platform, model, settings)
    parameters = platform.parameters(model)  # only now: a style replaces what it shards
    return TrainState(
        model=model, parallel=parallel, parameters=parameters, moments=optimizer.start(platform, parameters)
    )


def train_step(
    platform: Platform[Any], settings: Settings, state: TrainState, batch: np.ndarray
) -> tuple[TrainState, StepResult]:
    """Train on one global batch ``[sequences, seq_len + 1]``, of which this rank takes its part.

    Besides the host copy of each dispatch there is one, of the step's few figures, at its end.
    """
    xp = platform.xp
    parallel, parameters = state.parallel, state.parameters

    # 1. This rank's sequences.
    own = own_part(batch, parallel.data_rank, parallel.data_ranks)
    tokens, targets = platform.from_host(own[:, :-1].copy()), platform.from_host(own[:, 1:].reshape(-1))

    # 2. Forward and backward of this rank's term of the loss.
    def objective() -> tuple[Any, Any, Any]:
        logits, stats = state.model(tokens)
        load = xp.stack([layer.tokens_per_expert for layer in stats], axis=0)
        return (
            cross_entropy(platform, logits, targets, settings.batch_tokens),
            imbalance_loss(platform, [layer.routing for layer in stats], len(own), settings.sequences),
            platform.stop_gradient(xp.astype(load, logits.dtype)),
        )

    outputs, pullback = platform.vjp(objective, parameters=list(parameters.values()))
    loss, _, load = (platform.stop_gradient(output) for output in outputs)
    # The cotangents are the weights of the outputs in what is minimised.
    weights = [xp.full((), weight, dtype=loss.dtype) for weight in (1.0, settings.balance)]
    gradients = dict(zip(parameters, pullback(*weights, xp.zeros_like(load)), strict=True))

    # 3. Sum over ranks; the figures travel with the gradients.
    gradients, (loss, load) = sum_gradients(platform, parameters, gradients, parallel, [xp.reshape(loss, (1,)), load])

    # 4. Clip, and update.
    norm = global_norm(platform, parameters, gradients, parallel)
    scale = clip_scale(platform, norm, settings.clip_norm)
    step = state.step + 1
    moments = optimizer.update(
        platform,
        parameters,
        {name: gradient * scale for name, gradient in gradients.items()},
        state.moments,
        step=step,
        rate=optimizer.learning_rate(step, lr=settings.lr, warmup_steps=settings.warmup_steps),
        weight_decay=settings.weight_decay,
    )

    # 5. Host sync here, the only one that is not a dispatch's.
    loss_host, norm_host, load_host = platform.to_host(loss, norm, load)
    result = StepResult(
        loss=float(loss_host[0]), gradient_norm=float(norm_host), expert_load=load_host.round().astype(np.int64)
    )
    return replace(state, moments=moments, step=step), result
