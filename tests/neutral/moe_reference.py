# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer in plain NumPy, float64, one token at a time: what the neutral layer is held to."""

import math

import numpy as np


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def choose(probabilities, router, bias):
    """Chosen experts of one token, best first."""
    selection = probabilities + bias
    allowed = list(range(router.num_experts))
    if router.num_groups > 1:
        size = router.num_experts // router.num_groups
        groups = [allowed[g * size : (g + 1) * size] for g in range(router.num_groups)]
        group_scores = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(router.num_groups), key=lambda g: (-group_scores[g], g))[: router.top_groups]
        allowed = [e for g in best for e in groups[g]]
    return sorted(allowed, key=lambda e: (-selection[e], e))[: router.top_k]


def route(logits, router, bias=None):
    """Experts [T, K], scores [T, K], probabilities [T, E]."""
    bias = np.zeros(router.num_experts) if bias is None else bias
    function = {"softmax": softmax, "sigmoid": sigmoid}[router.score_function]
    probabilities = np.array([function(z) for z in logits]).reshape(logits.shape)
    experts = np.array([choose(p, router, bias) for p in probabilities], dtype=np.int64).reshape(-1, router.top_k)
    scores = np.zeros(experts.shape)
    for t, chosen in enumerate(experts):
        scores[t] = probabilities[t, chosen]
        if router.normalize:
            scores[t] /= scores[t].sum()
    return experts, scores * router.route_scale, probabilities


def kept(experts, scores, num_experts, capacity_factor, policy):
    """Which choices [T, K] stay; all of them without a capacity."""
    keep = np.ones(experts.shape, dtype=bool)
    if capacity_factor is None:
        return keep
    capacity = math.ceil(capacity_factor * experts.size / num_experts)
    for e in range(num_experts):
        candidates = [(t, k) for t, k in np.ndindex(experts.shape) if experts[t, k] == e]
        if policy == "probability":
            candidates.sort(key=lambda tk: -np.float32(scores[tk]))
        for t, k in candidates[capacity:]:
            keep[t, k] = False
    return keep


def layer(x, p, config, bias=None):
    """Output [T, D] and the kept choices, from parameters by the paths of the neutral layer."""
    router = config.router
    experts, scores, _ = route(x @ p["router.gate"].T, router, bias)
    keep = kept(experts, scores, router.num_experts, config.capacity_factor, config.drop_policy)
    out = np.zeros(x.shape)
    for t, k in np.ndindex(experts.shape):
        if keep[t, k]:
            e = experts[t, k]
            hidden = silu(p["experts.w1"][e] @ x[t]) * (p["experts.w3"][e] @ x[t])
            out[t] += scores[t, k] * (p["experts.w2"][e] @ hidden)
    if config.num_shared_experts:
        w1, w2, w3 = (p[f"shared_experts.{name}.weight"] for name in ("w1", "w2", "w3"))
        out += (silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    return out, experts, keep


def balancing_loss(experts, probabilities, counts=None, tokens=None):
    """sum_i f_i P_i of one scope; counts and tokens may be those of a larger one."""
    total, num_experts = probabilities.shape
    if not total:
        return 0.0
    if counts is None:
        counts = np.array([(experts == e).sum() for e in range(num_experts)])
        tokens = total
    loss = 0.0
    for i in range(num_experts):
        f = num_experts * counts[i] / (experts.shape[1] * tokens)
        loss += f * sum(probabilities[t, i] / probabilities[t].sum() for t in range(total)) / total
    return loss


def z_loss(logits):
    return np.mean([np.log(np.exp(z).sum()) ** 2 for z in logits]) if len(logits) else 0.0


def gradient(function, x, step=1e-6):
    """Central differences of a scalar function."""
    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * step
            ends.append(function(moved))
        out[index] = (ends[0] - ends[1]) / (2 * step)
    return out
