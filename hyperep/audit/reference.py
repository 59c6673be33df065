# SPDX-License-Identifier: Apache-2.0
"""The layer in NumPy, whole and in float64, and its results taken apart into what each choice contributes.

Independent of the platforms: its gradients come of autograd over the few lines below, where no token travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import make_vjp

from hyperep.audit.claims import Claims

__all__ = ["Backward", "Terms", "terms_of"]

Weights = Mapping[str, np.ndarray]


Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class Backward:
    """The backward pass of one rank's tokens in pieces, which ``rivals.py`` puts together in wrong ways."""

    cotangent: np.ndarray
    """``[T, D]``: of the output."""
    weighted: np.ndarray
    """``[E, T, D]``: cotangents of what the experts return."""
    used: np.ndarray
    """``[T, E]``: by what the experts' inputs were multiplied."""
    of_inputs: np.ndarray
    """``[E, T, D]``: gradients of the experts' inputs."""
    of_scores: np.ndarray
    """``[T, E]``: gradients of the weights of the experts."""
    through_experts: Callable[[np.ndarray], tuple[Weights, np.ndarray]]
    """Cotangents ``[E, T, D]`` -> gradients of the experts' weights and of their inputs ``[E, T, D]``."""
    through_scores: Callable[[np.ndarray], Pair]
    """Gradients of the weights of the experts ``[T, E]`` -> those of the router ``[E', E, D]`` and of the tokens
    ``[E', T, D]``, by way of each expert's score."""
    undivided: Callable[[np.ndarray], Pair] | None
    """The same, ``[E, D]`` and ``[T, D]``, with the sum of the scores taken for a constant; ``None`` if they are not
    divided by it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """One rank's tokens through the layer, and back; with sums not yet taken."""

    tokens: np.ndarray
    """``[T, D]``."""
    order: np.ndarray
    """``[T, K]``: the experts that each token chooses, the best first; those dropped by a capacity among them."""
    plain: np.ndarray
    """``[T, E]``: the scores of all experts before choosing."""
    combine: np.ndarray
    """``[T, E]``: weights of the experts in the output; zero where not chosen, or dropped."""
    outputs: np.ndarray
    """``[E, T, D]``: what each expert makes of each token, chosen or not; if scores weight the input, of the weighted
    token where it is chosen."""
    shared: np.ndarray
    """``[T, D]``: of the shared expert; zeros if there is none."""
    back_experts: np.ndarray
    """``[E, T, D]``: gradients of the tokens by way of each expert, weighted."""
    back_router: np.ndarray
    """``[E, T, D]``: gradients of the tokens by way of the score of each expert."""
    back_shared: np.ndarray
    """``[T, D]``."""
    gradients: Mapping[str, np.ndarray]
    """Weight -> the gradient due to this rank's tokens. For experts ``[E, ...]``; for the router ``[E', E, D]``, where
    ``E'`` is the expert whose score it goes through."""
    backward: Backward
    """How they came about."""
    weighted_output: bool
    """Whether scores multiply outputs; else the terms of the output are in :attr:`outputs` already."""

    @property
    def coefficients(self) -> np.ndarray:
        """``[T, E]``: how often each of :attr:`outputs` is in the output."""
        return self.combine if self.weighted_output else (self.combine != 0).astype(np.float64)

    @property
    def output(self) -> np.ndarray:
        """``[T, D]``: what the layer returns."""
        return np.einsum("te,etd->td", self.coefficients, self.outputs) + self.shared

    @property
    def token_gradient(self) -> np.ndarray:
        """``[T, D]``."""
        return self.back_experts.sum(axis=0) + self.back_router.sum(axis=0) + self.back_shared


def terms_of(claims: Claims, weights: Weights, tokens: np.ndarray, cotangent: np.ndarray) -> Terms:
    """Take the layer apart for one rank's tokens ``[T, D]`` and the cotangent of its output.

    Args:
        claims: what the layer is.
        weights: whole, by name.
        tokens: ``[T, D]``.
        cotangent: ``[T, D]``.
    """
    experts, x, g = claims.sizes.experts, np.asarray(tokens, np.float64), np.asarray(cotangent, np.float64)
    of_expert = {name: np.asarray(weights[name], np.float64) for name in claims.expert.shapes}
    router = np.asarray(weights["router"], np.float64)
    plain = _scores(claims, x @ router.T)
    order = np.argsort(-plain, axis=1, kind="stable")[:, : claims.sizes.top_k]
    kept = _kept(claims, plain, order)
    chosen = np.zeros_like(plain)
    np.put_along_axis(chosen, order, 1.0, axis=1)

    def combine(router: Any, x: Any) -> Any:
        """Weights of the experts, ``[..., T, E]``; both arguments may have further dims before theirs."""
        scores = _scores(claims, anp.matmul(x, anp.swapaxes(router, -1, -2))) * chosen
        if claims.normalize:
            scores = scores / anp.sum(scores, axis=-1, keepdims=True)
        return claims.scale * scores * kept

    # The router's inputs once for each expert, so that the gradients by way of each score stay apart.
    every = np.repeat(router[None], experts, axis=0), np.repeat(x[None], experts, axis=0)  # [E, E, D], [E, T, D]
    own = np.eye(experts)[:, None, :]

    def combine_apart(routers: Any, xs: Any) -> Any:
        return anp.swapaxes(anp.sum(combine(routers, xs) * own, axis=-1), 0, 1)  # [T, E]

    back_to_router, weights_now = make_vjp(combine_apart, argnum=0)(*every)
    back_to_tokens, _ = make_vjp(combine_apart, argnum=1)(*every)
    on_input = claims.weighting == "input"
    used = np.where(weights_now != 0, weights_now, 1.0) if on_input else np.ones_like(weights_now)
    inputs = x[None] * used.T[:, :, None]  # [E, T, D]
    times = (weights_now != 0).astype(np.float64) if on_input else weights_now
    forward = _all_experts(claims)
    back, outputs = make_vjp(lambda pair: forward(pair[0], pair[1]))((of_expert, inputs))
    of_weights, of_inputs = back(times.T[:, :, None] * g[None])
    if on_input:
        of_scores = np.einsum("etd,td->te", of_inputs, x) * times
    else:
        of_scores = np.einsum("etd,td->te", outputs, g)
    gradients = {"router": np.asarray(back_to_router(of_scores)), **of_weights}
    undivided: Callable[[np.ndarray], Pair] | None = None
    if claims.normalize:
        total = (plain * chosen).sum(axis=1, keepdims=True)

        def with_total(router: Any, x: Any) -> Any:
            scores = _scores(claims, anp.matmul(x, anp.transpose(router)))
            return claims.scale * scores * chosen * kept / total

        def undivided(given: np.ndarray) -> Pair:
            of_router, of_tokens = (make_vjp(with_total, argnum=i)(router, x)[0](given) for i in (0, 1))
            return np.asarray(of_router), np.asarray(of_tokens)

    back_experts, back_router = of_inputs * used.T[:, :, None], np.asarray(back_to_tokens(of_scores))
    shared, back_shared = np.zeros_like(x), np.zeros_like(x)
    if claims.shared:
        one = {name: np.asarray(weights[f"shared_{name}"], np.float64) for name in claims.expert.shapes}
        back_all, shared = make_vjp(lambda pair: claims.expert.forward(pair[0], pair[1]))((one, x))
        of_shared, back_shared = back_all(g)
        gradients |= {f"shared_{name}": gradient for name, gradient in of_shared.items()}
    return Terms(
        tokens=x,
        order=order,
        plain=plain,
        combine=weights_now,
        outputs=outputs,
        shared=shared,
        back_experts=back_experts,
        back_router=back_router,
        back_shared=back_shared,
        gradients=gradients,
        backward=Backward(
            cotangent=g,
            weighted=times.T[:, :, None] * g[None],
            used=used,
            of_inputs=of_inputs,
            of_scores=of_scores,
            through_experts=back,
            through_scores=lambda given: (np.asarray(back_to_router(given)), np.asarray(back_to_tokens(given))),
            undivided=undivided,
        ),
        weighted_output=not on_input,
    )


def _scores(claims: Claims, logits: Any) -> Any:
    if claims.scores == "sigmoid":
        return 1 / (1 + anp.exp(-logits))
    powers = anp.exp(logits - np.max(_plain(logits), axis=-1, keepdims=True))
    return powers / anp.sum(powers, axis=-1, keepdims=True)


def _plain(x: Any) -> Any:
    while hasattr(x, "_value"):
        x = x._value
    return x


def _kept(claims: Claims, plain: np.ndarray, order: np.ndarray) -> np.ndarray:
    """``[T, E]``: one where a choice is within its expert's capacity."""
    kept = np.zeros_like(plain)
    np.put_along_axis(kept, order, 1.0, axis=1)
    if claims.capacity is None:
        return kept
    tokens, top_k = order.shape
    capacity = math.ceil(claims.capacity * tokens * top_k / claims.sizes.experts)
    for e in range(claims.sizes.experts):
        choosing = np.flatnonzero(kept[:, e])
        if claims.drop == "probability":
            choosing = choosing[np.argsort(-plain[choosing, e], kind="stable")]
        kept[choosing[capacity:], e] = 0.0
    return kept


def _all_experts(claims: Claims) -> Any:
    """``forward(weights [E, ...], rows [E, N, D]) -> [E, N, D]``."""
    if claims.expert.batched:
        return claims.expert.forward
    return lambda w, x: anp.stack(
        [claims.expert.forward({name: w[name][e] for name in w}, x[e]) for e in range(claims.sizes.experts)]
    )
