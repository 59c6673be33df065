# SPDX-License-Identifier: Apache-2.0
"""Each parallel style against the unsharded experts, which every rank computes by NumPy from the data of all ranks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance import oracle
from hyperep.conformance.case import Case
from hyperep.conformance.memory import freed, keeps_growing, kept_bytes, watch
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.conformance.routings import ROUTINGS
from hyperep.moe import GroupedExperts, MoEConfig, RouterConfig, build_moe
from hyperep.platform.capabilities import Capability

PORT = "styles"
_BASE = (Capability.AUTODIFF, Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.GROUPED_MATMUL)
_EP = (*_BASE, Capability.ALL_TO_ALL, Capability.PERMUTE_ROWS)
_TP = (*_BASE, Capability.ALL_REDUCE)
_ETP = (*_EP, Capability.ALL_REDUCE, Capability.SUBGROUPS)
_NAMES = ("w1", "w2", "w3")
_DIM, _HIDDEN = 5, 8
_TOLERANCE = 1e-4
"""Relative; frameworks have an exponential of their own. A row in the wrong place is wrong by 1, a lost term by 0.1."""


class _Problem:
    """Experts with weights of size O(1), and rows, counts and cotangents of every data rank."""

    def __init__(self, case: Case, counts: np.ndarray, *key: int) -> None:
        self.case, self.counts = case, counts
        experts, hidden = counts.shape[1], case.divisible(_HIDDEN)
        shapes = {"w1": (experts, hidden, _DIM), "w2": (experts, _DIM, hidden), "w3": (experts, hidden, _DIM)}
        self.weights = {name: case.normal(shape, 10 + i, *key) / 2 for i, (name, shape) in enumerate(shapes.items())}
        self.rows = [case.normal((n, _DIM), 20, r, *key) for r, n in enumerate(counts.sum(axis=1))]
        self.cotangents = [case.normal((n, _DIM), 30, r, *key) for r, n in enumerate(counts.sum(axis=1))]

    def experts(self, style: Any, mesh: Any) -> Any:
        """The native experts, sharded by *style*."""
        module = GroupedExperts(self.case.platform, _DIM, self.case.divisible(_HIDDEN), self.counts.shape[1])
        self.case.assign(module, self.weights)
        return style.apply(module, mesh)

    def inputs(self, data_rank: int) -> tuple[Any, Any]:
        return self.case.tensor(self.rows[data_rank]), self.case.tensor(self.counts[data_rank])

    def reference(self) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
        """Outputs and input gradients of each data rank, and the gradients of the whole weights, summed over ranks."""
        w1, w2, w3 = (self.weights[name] for name in _NAMES)
        outputs, gradients = [], []
        total = {name: np.zeros_like(self.weights[name]) for name in _NAMES}
        for x, sizes, g in zip(self.rows, self.counts.tolist(), self.cotangents, strict=True):
            outputs.append(oracle.experts(x, w1, w2, w3, sizes))
            gx, *gw = oracle.experts_gradients(x, w1, w2, w3, sizes, g)
            gradients.append(gx)
            for name, gradient in zip(_NAMES, gw, strict=True):
                total[name] += gradient
        return outputs, gradients, total

    def agree(self, module: Any, data_rank: int, sum_of: Sequence[int] | None = None) -> None:
        """Demand the reference's output, input gradient, and weight gradients of this rank's parts."""
        case, platform = self.case, self.case.platform
        outputs, gradients, total = self.reference()
        x, counts = self.inputs(data_rank)
        handles = platform.parameters(module)
        case.is_true(set(handles) == set(_NAMES), f"the parameters of the experts are {sorted(handles)}")
        out, (gx, *gw) = case.gradients(
            lambda x: module(x, counts), [x], self.cotangents[data_rank], [handles[name] for name in _NAMES]
        )
        case.close(out, outputs[data_rank], "output", _TOLERANCE)
        case.close(gx, gradients[data_rank], "gradient of the input", _TOLERANCE)
        for name, gradient in zip(_NAMES, gw, strict=True):
            part = platform.sharding(handles[name]).local_slices(total[name].shape)
            case.close(gradient, total[name][part], f"gradient of this rank's part of {name}", _TOLERANCE)


def _routed(case: Case, routing: str, data_ranks: int, experts_per_rank: int = 2) -> np.ndarray:
    make, _ = ROUTINGS[routing]
    counts = make(case.rng(77), data_ranks, experts_per_rank * data_ranks)
    case.note(routing=routing, tokens_per_expert=counts.tolist())
    return counts


def _ep_mesh(case: Case) -> Any:
    return case.mesh((case.ranks,), ("ep",))


# --------------------------------------------------------------------------------------------------- ExpertParallel
def _ep_parity(routing: str) -> Requirement:
    def check(case: Case) -> None:
        problem = _Problem(case, _routed(case, routing, case.ranks))
        problem.agree(problem.experts(hyperep.ExpertParallel(), _ep_mesh(case)), case.rank)

    first = routing == "balanced"
    return requirement(
        f"EP-{routing}",
        f"ExpertParallel equals the unsharded experts in output and all gradients where {ROUTINGS[routing][1]}.",
        port=PORT,
        capabilities=_EP,
        needs=("DISPATCH-roundtrip", "SWIGLU-empty-group", "SHARD-gradients", "MOD-wrap")
        if first
        else ("EP-balanced",),
    )(check)


EP_PARITY = tuple(_ep_parity(routing) for routing in ROUTINGS)


@requirement(
    "EP-one-expert-each",
    "ExpertParallel is right with one expert a rank, where rows need no permutation.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
)
def one_expert_each(case: Case) -> None:
    problem = _Problem(case, _routed(case, "random", case.ranks, 1))
    problem.agree(problem.experts(hyperep.ExpertParallel(), _ep_mesh(case)), case.rank)


@requirement(
    "EP-weight-grad-empty-expert",
    "An expert that met no row has a weight gradient of zeros on its rank, of full size.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
)
def empty_expert_gradient(case: Case) -> None:
    counts = np.zeros((case.ranks, 2 * case.ranks), np.int64)
    counts[:, 0::2] = 2  # every second expert gets nothing
    case.note(tokens_per_expert=counts.tolist())
    problem = _Problem(case, counts)
    module = problem.experts(hyperep.ExpertParallel(), _ep_mesh(case))
    x, tokens = problem.inputs(case.rank)
    handles = case.platform.parameters(module)
    _, (_, *gradients) = case.gradients(
        lambda x: module(x, tokens), [x], problem.cotangents[case.rank], [handles[name] for name in _NAMES]
    )
    for name, gradient in zip(_NAMES, gradients, strict=True):
        case.is_true(bool(np.abs(gradient[0]).max() > 0), f"{name}: the gradient of the busy expert is zero")
        case.equal(gradient[1], np.zeros_like(gradient[1]), f"gradient of {name} of the idle expert")


@requirement(
    "EP-gradient-sum",
    "The gradient of an expert is the sum over the rows of all ranks: neither averaged nor multiplied by the ranks.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
)
def gradient_sum(case: Case) -> None:
    # The same rows on every rank: the gradient must be exactly as many times that of one rank.
    counts = np.full((case.ranks, 2 * case.ranks), 1)
    problem = _Problem(case, counts)
    problem.rows = [problem.rows[0]] * case.ranks
    problem.cotangents = [problem.cotangents[0]] * case.ranks
    problem.agree(problem.experts(hyperep.ExpertParallel(), _ep_mesh(case)), case.rank)


@requirement(
    "EP-two-layers",
    "One style object serves two layers with different routings in one graph.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-random",),
)
def two_layers(case: Case) -> None:
    style, mesh = hyperep.ExpertParallel(), _ep_mesh(case)
    # Two routings of the same number of rows on each rank, so that both layers can take the same input.
    base = _routed(case, "random", case.ranks)
    problems = [_Problem(case, base, 1), _Problem(case, base[:, ::-1].copy(), 2)]
    problems[1].rows, problems[1].cotangents = problems[0].rows, problems[0].cotangents
    layers = [p.experts(style, mesh) for p in problems]
    x, _ = problems[0].inputs(case.rank)
    tokens = [p.inputs(case.rank)[1] for p in problems]
    handles = [case.platform.parameters(layer)["w1"] for layer in layers]
    out, (gx, *gw) = case.gradients(
        lambda x: layers[0](x, tokens[0]) + layers[1](x, tokens[1]), [x], problems[0].cotangents[case.rank], handles
    )
    references = [p.reference() for p in problems]
    case.close(out, sum(r[0][case.rank] for r in references), "output", _TOLERANCE)
    case.close(gx, sum(r[1][case.rank] for r in references), "gradient of the input", _TOLERANCE)
    for number, (gradient, reference) in enumerate(zip(gw, references, strict=True)):
        part = case.platform.sharding(handles[number]).local_slices(reference[2]["w1"].shape)
        case.close(gradient, reference[2]["w1"][part], f"gradient of w1 of layer {number}", _TOLERANCE)


@requirement(
    "EP-interleaved",
    "Micro-batches may be under way at once: backward in the order of forward, as in a pipeline.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-random",),
)
def interleaved(case: Case) -> None:
    platform = case.platform
    problems = [_Problem(case, _routed(case, name, case.ranks), 0) for name in ("random", "hot-rank", "empty-expert")]
    for n, problem in enumerate(problems):  # the same experts, other rows
        problem.weights = problems[0].weights
        problem.rows = [case.normal(x.shape, 40, n, r) for r, x in enumerate(problem.rows)]
    module = problems[0].experts(hyperep.ExpertParallel(), _ep_mesh(case))
    under_way = []
    for problem in problems:
        x, tokens = problem.inputs(case.rank)
        under_way.append(platform.vjp(lambda x, t=tokens: module(x, t), x))
    for number, ((out, pullback), problem) in enumerate(zip(under_way, problems, strict=True)):
        outputs, gradients, _ = problem.reference()
        (gradient,) = pullback(case.tensor(problem.cotangents[case.rank]))
        case.close(out, outputs[case.rank], f"output of micro-batch {number}", _TOLERANCE)
        case.close(gradient, gradients[case.rank], f"input gradient of micro-batch {number}", _TOLERANCE)


@requirement(
    "EP-recompute",
    "A layer may be computed again in backward instead of being kept, with the same gradients.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-random",),
)
def recompute(case: Case) -> None:
    platform = case.platform
    problem = _Problem(case, _routed(case, "random", case.ranks))
    module = problem.experts(hyperep.ExpertParallel(), _ep_mesh(case))
    x, tokens = problem.inputs(case.rank)

    def forward(x: Any) -> tuple[Any, tuple[Any, ...]]:
        return module(x, tokens), (x,)

    def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        _, pullback = platform.vjp(lambda x: module(x, tokens), residuals[0])
        return pullback(cotangents[0])

    checkpointed = platform.custom_vjp(forward, backward)
    out, (gradient,) = case.gradients(lambda x: checkpointed(x), [x], problem.cotangents[case.rank])
    outputs, gradients, _ = problem.reference()
    case.close(out, outputs[case.rank], "output", _TOLERANCE)
    case.close(gradient, gradients[case.rank], "gradient of the input", _TOLERANCE)


@requirement(
    "EP-deterministic",
    "Two runs on the same data give the same bits, in output and gradients.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-random",),
)
def deterministic(case: Case) -> None:
    problem = _Problem(case, _routed(case, "random", case.ranks))
    module = problem.experts(hyperep.ExpertParallel(), _ep_mesh(case))
    x, tokens = problem.inputs(case.rank)
    handles = list(case.platform.parameters(module).values())
    runs = [case.gradients(lambda x: module(x, tokens), [x], problem.cotangents[case.rank], handles) for _ in range(2)]
    for first, second in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
        case.equal(second, first, "the second run against the first one")


class _Watched(hyperep.ExpertParallel):
    """Remembers, weakly, each context that it hands out."""

    def __init__(self) -> None:
        self.contexts: list[weakref.ref[Any]] = []

    def _token_dispatch(self, module: Any, inputs: Any, mesh: Any, num_experts: int) -> tuple[tuple[Any, ...], Any]:
        local_inputs, context = super()._token_dispatch(module, inputs, mesh, num_experts)
        self.contexts.append(weakref.ref(context))
        return local_inputs, context


@requirement(
    "EP-memory",
    "Nothing of a call outlives its graph: contexts, inputs, outputs and gradients are freed when output and pullback "
    "are dropped, and thirty steps take no more memory than a few.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced", "CUSTOM-freed"),
)
def memory(case: Case) -> None:
    problem = _Problem(case, _routed(case, "random", case.ranks))
    style = _Watched()
    module = problem.experts(style, _ep_mesh(case))
    problem.agree(module, case.rank)
    tensors = []
    for pull in (True, False):
        x, tokens = problem.inputs(case.rank)
        out, pullback = case.platform.vjp(lambda x, t=tokens: module(x, t), x)
        gradients = pullback(case.tensor(problem.cotangents[case.rank])) if pull else ()
        tensors += [watch(t) for t in (x, out, *gradients)]
        case.platform.to_host(out, *gradients)
        del x, out, pullback, gradients, tokens
    alive = [number for number, context in enumerate(style.contexts) if not freed(context)]
    case.is_true(not alive, f"the contexts of calls {alive} of {len(style.contexts)} are still alive")
    kept = [number for number, is_alive in enumerate(tensors) if not freed(is_alive)]
    case.is_true(not kept, f"of inputs, outputs and gradients, {kept} are still alive after their graphs were dropped")

    def step(number: int) -> None:
        rows, tokens = problem.inputs(case.rank)
        out, pullback = case.platform.vjp(lambda x: module(x, tokens), rows)
        pullback(out)

    problem.counts = np.full((case.ranks, 2 * case.ranks), 8000 // case.ranks)
    problem.rows = [case.normal((int(n), _DIM), 20, r) for r, n in enumerate(problem.counts.sum(axis=1))]
    calls, size = 30, problem.rows[case.rank].nbytes
    grown = functools.partial(kept_bytes, step, calls=calls, barrier=case.platform.barrier)
    guilty = keeps_growing(case, {"steps": grown}, calls * size // 2)
    case.is_true(not guilty, f"{guilty.get('steps')} bytes more after {calls} steps with {size} bytes each")


@requirement(
    "EP-applied-twice",
    "Applying a style to sharded experts is an error on every rank.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
)
def applied_twice(case: Case) -> None:
    problem = _Problem(case, _routed(case, "balanced", case.ranks))
    mesh = _ep_mesh(case)
    module = problem.experts(hyperep.ExpertParallel(), mesh)
    case.raises(ValueError, lambda: hyperep.ExpertParallel().apply(module, mesh), "distributed already")
    problem.agree(module, case.rank)


@requirement(
    "EP-indivisible",
    "A number of experts that the mesh does not divide is an error on every rank, and changes nothing.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
    min_ranks=2,
)
def indivisible(case: Case) -> None:
    module = GroupedExperts(case.platform, _DIM, case.divisible(_HIDDEN), case.ranks + 1)
    before = case.host(case.platform.local(case.platform.parameters(module)["w1"]))
    case.raises(ValueError, lambda: hyperep.ExpertParallel().apply(module, _ep_mesh(case)), "divisible")
    case.equal(case.platform.local(case.platform.parameters(module)["w1"]), before, "w1 after the error")


@requirement(
    "EP-wrong-mesh",
    "A mesh with another number of dimensions, or other names, is an error that says which mesh is wanted.",
    port=PORT,
    capabilities=_EP,
    needs=("EP-balanced",),
)
def wrong_mesh(case: Case) -> None:
    module = GroupedExperts(case.platform, _DIM, case.divisible(_HIDDEN), case.ranks)
    for shape, names in (((case.ranks,), ("dp",)), ((case.ranks, 1), ("ep", "tp"))):
        mesh = case.mesh(shape, names)
        case.raises(ValueError, functools.partial(hyperep.ExpertParallel().apply, module, mesh), "[ep]")


@requirement(
    "EP-threads",
    "Two layers on groups of their own may run in two threads of each rank.",
    port=PORT,
    level=Level.STRESS,
    capabilities=(*_EP, Capability.THREADS, Capability.SUBGROUPS),
    needs=("EP-random", "GROUP-twice", "VJP-threads"),
    refusable=False,
)
def threads(case: Case) -> None:
    from concurrent.futures import ThreadPoolExecutor

    style = hyperep.ExpertParallel()
    problems = [_Problem(case, _routed(case, name, case.ranks), n) for n, name in enumerate(("random", "hot-rank"))]
    # Not the mesh that checks share: each layer has a group of its own here.
    meshes = [hyperep.init_device_mesh(case.platform, (case.ranks,), ("ep",)) for _ in problems]
    layers = [problem.experts(style, mesh) for problem, mesh in zip(problems, meshes, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            jobs = [pool.submit(p.agree, layer, case.rank) for p, layer in zip(problems, layers, strict=True)]
            for job in jobs:
                job.result()


# ------------------------------------------------------------------------------------------------ the layer around it
def _layers(case: Case, top_k: int) -> tuple[Any, Any]:
    """A whole MoE layer, and the same one with its experts sharded."""
    # Not normalised: the one score of top-1 would be the constant 1, and its gradient nothing but rounding.
    router = RouterConfig(num_experts=2 * case.ranks, top_k=top_k, normalize=False)
    config = MoEConfig(dim=_DIM, hidden_dim=case.divisible(_HIDDEN), router=router)
    whole, sharded = (build_moe(case.platform, config, seed=3) for _ in range(2))
    experts = case.platform.named_modules(sharded)["experts"]
    hyperep.ExpertParallel().apply(experts, _ep_mesh(case))
    return whole, sharded


def _layers_agree(case: Case, top_k: int, tokens: int) -> None:
    """Demand that both layers do the same with so many tokens of this rank, in output and all gradients."""
    platform = case.platform
    whole, sharded = _layers(case, top_k)
    x, g = (4 * case.normal((tokens, _DIM), n, case.rank) for n in (1, 2))
    # Each rank runs the whole layer on its own tokens; weight gradients are then summed over the ranks.
    runs = []
    for layer in (whole, sharded):
        handles = platform.parameters(layer)
        runs.append((handles, *case.gradients(lambda x, m=layer: m(x), [x], g, list(handles.values()))))
    (names, out, (gx, *gw)), (handles, sharded_out, (sharded_gx, *sharded_gw)) = runs
    case.close(sharded_out, out, "output", _TOLERANCE)
    case.close(sharded_gx, gx, "gradient of the input", _TOLERANCE)
    for name, want, got in zip(names, gw, sharded_gw, strict=True):
        sharding = platform.sharding(handles[name])
        if sharding is not None:
            want = case.host(platform.all_reduce(case.tensor(want)))[sharding.local_slices(want.shape)]
        case.close(got, want, f"gradient of {name}", _TOLERANCE)


def _layer_parity(top_k: int) -> Requirement:
    def check(case: Case) -> None:
        _layers_agree(case, top_k, 7)

    return requirement(
        f"MOE-top{top_k}",
        f"A whole layer with top-{top_k} routing equals the unsharded one, the router's gradient included.",
        port=PORT,
        capabilities=(*_EP, Capability.ALL_REDUCE),
        needs=(
            "EP-tokens",
            "MOD-any-output",
            "XP-argsort",
            "XP-take-along-axis",
            "XP-searchsorted",
            "XP-grad-indexing",
            "SUM-rows",
        ),
    )(check)


MOE_PARITY = (_layer_parity(1), _layer_parity(2))


@requirement(
    "MOE-no-tokens",
    "A rank without tokens takes part in forward and backward of a layer, whichever it is: outputs and all gradients "
    "are those of the unsharded layer, on the other ranks too.",
    port=PORT,
    capabilities=(*_EP, Capability.ALL_REDUCE),
    needs=("MOE-top1",),
)
def no_tokens(case: Case) -> None:
    for idle in (*range(case.ranks), None):
        case.note(idle="all" if idle is None else idle)
        _layers_agree(case, 1, 0 if idle in (case.rank, None) else 5)


# ----------------------------------------------------------------------------------- TensorParallel and both together
@requirement(
    "TP-parity",
    "TensorParallel equals the unsharded experts in output, input gradient and weight gradients, for replicated rows.",
    port=PORT,
    capabilities=_TP,
    needs=("SWIGLU-grad", "SHARD-gradients", "COPY-grad", "REDUCE-grad", "MOD-wrap"),
)
def tp_parity(case: Case) -> None:
    mesh = case.mesh((case.ranks,), ("tp",))
    for routing in ("random", "empty-expert", "all-empty"):
        counts = _routed(case, routing, 1, 4)
        problem = _Problem(case, counts)
        problem.agree(problem.experts(hyperep.TensorParallel(), mesh), 0)


@requirement(
    "TP-partial",
    "TensorParallel with a Partial output leaves the sum over ranks to the caller.",
    port=PORT,
    capabilities=_TP,
    needs=("TP-parity",),
)
def tp_partial(case: Case) -> None:
    mesh = case.mesh((case.ranks,), ("tp",))
    problem = _Problem(case, _routed(case, "random", 1, 4))
    module = problem.experts(hyperep.TensorParallel(output_layout=hyperep.Partial()), mesh)
    partial = module(*problem.inputs(0))
    outputs, _, _ = problem.reference()
    total = case.platform.all_reduce(partial, mesh.get_group())
    case.close(total, outputs[0], "sum of the partial outputs", _TOLERANCE)


@requirement(
    "TP-indivisible",
    "A hidden size that the mesh does not divide is an error on every rank, and changes nothing.",
    port=PORT,
    capabilities=_TP,
    needs=("TP-parity",),
    min_ranks=2,
)
def tp_indivisible(case: Case) -> None:
    mesh = case.mesh((case.ranks,), ("tp",))
    module = GroupedExperts(case.platform, _DIM, case.ranks + 1, 2)
    case.raises(ValueError, lambda: hyperep.TensorParallel().apply(module, mesh), "tp")
    for name, parameter in case.platform.parameters(module).items():
        case.is_true(case.platform.sharding(parameter) is None, f"{name} was sharded in spite of the error")


def _etp_parity(routing: str) -> Requirement:
    def check(case: Case) -> None:
        for tp in (n for n in (1, 2, 4) if case.ranks % n == 0):
            shape = (case.ranks // tp, tp)
            mesh = case.mesh(shape, ("ep", "tp"))
            problem = _Problem(case, _routed(case, routing, shape[0]), tp)
            case.note(mesh=shape)
            problem.agree(problem.experts(hyperep.ExpertTensorParallel(), mesh), mesh.get_local_rank("ep"))

    return requirement(
        f"ETP-{routing}",
        "ExpertTensorParallel equals the unsharded experts on every shape of mesh, rows replicated over tp, where "
        f"{ROUTINGS[routing][1]}.",
        port=PORT,
        level=Level.OPTIONAL,
        capabilities=_ETP,
        needs=("EP-random", "TP-parity", "MESH-lines", "GROUP-world") if routing == "random" else ("ETP-random",),
    )(check)


ETP_PARITY = tuple(_etp_parity(routing) for routing in ("random", "hot-rank", "empty-expert", "all-empty"))
