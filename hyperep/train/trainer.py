# SPDX-License-Identifier: Apache-2.0
"""One step of training, told once: the same for a model that is spread over ranks and for one that is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from hyperep.train.settings import VOCABULARY, Settings

__all__ = [
    "Gradients",
    "StepResult",
    "TrainState",
    "find_gradients",
    "new_state",
    "require_sound",
    "take_step",
    "train_step",
]

DIVERGED = 10 * math.log(VOCABULARY)
"""A loss, in nats per byte, that no weights have from which training could go on: ten times that of a uniform guess."""


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
    load: np.ndarray
    """int64 ``[layers, R, E]``: how many choices of the tokens of each data rank are which expert."""
    choices: np.ndarray | None = None
    """Unsigned integers ``[layers, tokens, K]``: the experts of each token of the batch, where they are recorded."""

    @property
    def expert_load(self) -> np.ndarray:
        """int64 ``[layers, E]``: rows that each expert got."""
        return self.load.sum(axis=1)


def new_state(platform: Platform[Any], settings: Settings, *, unsharded: bool = False) -> TrainState:
    """A model with its initial weights, spread over the world (collective), or whole on the calling rank."""
    model = LanguageModel(in_precision(platform, choose_dtype(platform, settings.dtype)), settings)
    parallel = Parallel() if unsharded else parallelize(platform, model, settings)
    parameters = platform.parameters(model)  # only now: a style replaces what it shards
    return TrainState(
        model=model, parallel=parallel, parameters=parameters, moments=optimizer.start(platform, parameters)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """What a batch says about the weights, before anything is changed by it."""

    clipped: Mapping[str, Any]
    """By the parameter's path, like this rank's part of it."""
    result: StepResult


def train_step(
    platform: Platform[Any], settings: Settings, state: TrainState, batch: np.ndarray
) -> tuple[TrainState, StepResult]:
    """Train on one global batch ``[sequences, seq_len + 1]``, of which this rank takes its part.

    Raises:
        ValueError: as :func:`require_sound` does; the state is as it was.
    """
    gradients = find_gradients(platform, settings, state, batch)
    require_sound(settings, gradients.result, f"at step {state.step + 1}")
    return take_step(platform, settings, state, gradients), gradients.result


def find_gradients(platform: Platform[Any], settings: Settings, state: TrainState, batch: np.ndarray) -> Gradients:
    """The first part of a step, which changes nothing.

    Besides the host copy of each dispatch there is one, of the step's few figures, at its end.
    """
    xp = platform.xp
    parallel, parameters = state.parallel, state.parameters

    # 1. This rank's sequences.
    own = own_part(batch, parallel.data_rank, parallel.data_ranks)
    tokens, targets = platform.from_host(own[:, :-1].copy()), platform.from_host(own[:, 1:].reshape(-1))

    # 2. Forward and backward of this rank's term of the loss.
    def objective() -> tuple[Any, ...]:
        logits, stats = state.model(tokens)
        known = [xp.stack([layer.tokens_per_expert for layer in stats], axis=0)]  # [layers, E]
        if settings.record_trace:
            known.append(xp.stack([layer.routing.experts for layer in stats], axis=0))  # [layers, T, K]
        return (
            cross_entropy(platform, logits, targets, settings.batch_tokens),
            imbalance_loss(platform, [layer.routing for layer in stats], len(own), settings.sequences),
            *(platform.stop_gradient(xp.astype(x, logits.dtype)) for x in known),
        )

    outputs, pullback = platform.vjp(objective, parameters=list(parameters.values()))
    loss, _, *known = (platform.stop_gradient(output) for output in outputs)
    # The cotangents are the weights of the outputs in what is minimised.
    weights = [xp.full((), weight, dtype=loss.dtype) for weight in (1.0, settings.balance)]
    gradients = dict(zip(parameters, pullback(*weights, *map(xp.zeros_like, known)), strict=True))

    # 3. Sum over ranks; the figures travel with the gradients, those of each rank in a place of their own.
    figures = [xp.reshape(loss, (1,)), *(_in_own_place(platform, x, parallel) for x in known)]
    gradients, (loss, *known) = sum_gradients(platform, parameters, gradients, parallel, figures)

    # 4. Clip.
    norm = global_norm(platform, parameters, gradients, parallel)
    scale = clip_scale(platform, norm, settings.clip_norm)
    clipped = {name: gradient * scale for name, gradient in gradients.items()}

    # 5. Host sync here, the only one that is not a dispatch's: whether to update is decided by what it brings.
    loss_host, norm_host, *known_host = platform.to_host(loss, norm, *known)
    load, *choices = (x.round().astype(np.int64).swapaxes(0, 1) for x in known_host)  # [layers, R, ...]
    result = StepResult(
        loss=float(loss_host[0]),
        gradient_norm=float(norm_host),
        load=load,
        choices=_as_batch(choices[0], settings.experts) if choices else None,
    )
    return Gradients(clipped=clipped, result=result)


def _in_own_place(platform: Platform[Any], x: Any, parallel: Parallel) -> Any:
    """``[R, ...]`` over the data ranks, zero but for this one's *x*: what a sum over ranks makes whole."""
    xp = platform.xp
    zeros = xp.zeros_like(x)
    return xp.stack([x if r == parallel.data_rank else zeros for r in range(parallel.data_ranks)], axis=0)


def _as_batch(choices: np.ndarray, experts: int) -> np.ndarray:
    """Choices ``[layers, R, T, K]`` in the order of the batch, ``[layers, R * T, K]``, in as few bytes as hold them."""
    layers, ranks, tokens, top_k = choices.shape
    return choices.reshape(layers, ranks * tokens, top_k).astype(np.min_scalar_type(experts - 1))


def require_sound(settings: Settings, result: StepResult, when: str) -> None:
    """Check that weights with these figures are worth going on from; *when* tells people which ones they are.

    Raises:
        ValueError: the loss or the norm of its gradient is not finite, or the loss is beyond all measure. All ranks
            have the same figures.
    """
    for what, value in (("the loss", result.loss), ("the norm of the gradient", result.gradient_norm)):
        if not math.isfinite(value):
            raise ValueError(f"{what} is {value} {when}; try a lower --lr than {settings.lr:g}")
    if result.loss > DIVERGED:
        raise ValueError(
            f"the loss is {result.loss:g} {when}, more than ten times that of a uniform guess: training has diverged; "
            f"try a lower --lr than {settings.lr:g}"
        )


def take_step(platform: Platform[Any], settings: Settings, state: TrainState, gradients: Gradients) -> TrainState:
    """The second part of a step: update the parameters, in place. No communication."""
    step = state.step + 1
    moments = optimizer.update(
        platform,
        state.parameters,
        gradients.clipped,
        state.moments,
        step=step,
        rate=optimizer.learning_rate(step, lr=settings.lr, warmup_steps=settings.warmup_steps),
        weight_decay=settings.weight_decay,
    )
    return replace(state, moments=moments, step=step)
