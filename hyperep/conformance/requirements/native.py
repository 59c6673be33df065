# SPDX-License-Identifier: Apache-2.0
"""Native life: the framework's own backward, optimizer and saved state, compared with ``vjp`` and ``local``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance.case import Case
from hyperep.conformance.native import NativeTraining
from hyperep.conformance.requirement import Level, Requirement, requirement
from hyperep.moe import MoEConfig, RouterConfig, build_moe
from hyperep.platform.capabilities import Capability

PORT = "native life"
_NATIVE = (Capability.NATIVE_TRAINING, Capability.AUTODIFF, Capability.MODULES)
_TOLERANCE = 1e-4


def _native(case: Case) -> NativeTraining:
    hook = getattr(case.platform, "native_training", None)
    case.is_true(hook is not None, "NATIVE_TRAINING is declared, but the platform has no attribute native_training")
    return hook  # type: ignore[return-value]


def _requirement(
    id: str, demand: str, needs: tuple[str, ...], *capabilities: Capability
) -> Callable[[Callable[[Case], None]], Requirement]:
    return requirement(
        id,
        demand,
        port=PORT,
        level=Level.OPTIONAL,
        capabilities=(*_NATIVE, *capabilities),
        needs=needs,
        refusable=False,
    )


def _agree(
    case: Case, function: Callable[..., Any], inputs: Sequence[np.ndarray], parameters: Sequence[Any], g: np.ndarray
) -> None:
    """Demand the output and gradients of ``vjp`` of the framework's own backward, twice: nothing is left behind."""
    want, gradients = case.gradients(function, list(inputs), g, parameters)
    for time in range(2):
        tensors = [case.tensor(x) for x in inputs]
        out, found = _native(case).backward(function, tensors, parameters, case.tensor(g))
        case.close(out, want, f"output, time {time}", _TOLERANCE)
        case.is_true(len(found) == len(gradients), f"{len(found)} gradients for {len(gradients)} inputs and parameters")
        for n, (got, gradient) in enumerate(zip(found, gradients, strict=True)):
            what = f"input {n}" if n < len(inputs) else f"parameter {n - len(inputs)}"
            case.is_true(got is not None, f"the framework's own backward gives {what} no gradient")
            case.close(got, gradient, f"the framework's own gradient of {what}, time {time}", _TOLERANCE)


def _nested(case: Case) -> Any:
    """A module with a child, a wrapper, a custom function inside, a parameter and a buffer each."""
    platform = case.platform
    square = platform.custom_vjp(lambda x: (x * x, (x,)), lambda residuals, c, needed: (20 * residuals[0] * c[0],))

    def make(name: str, key: int, children: dict[str, Any] | None = None) -> Any:
        def forward(m: Any, x: Any) -> Any:
            out = square(m.w * x) + m.b
            return m.inner(out) if children else out

        tensors = {"w": case.tensor(case.normal((3,), key))}
        buffers = {"b": case.tensor(case.normal((3,), key + 1))}
        return platform.make_module(name, tensors, forward, buffers=buffers, children=children)

    inner = make("Inner", 30)
    platform.wrap_forward(inner, lambda inner, x: 2 * inner(x))
    return make("Outer", 40, {"inner": inner})


@_requirement(
    "NATIVE-backward",
    "The framework's own backward goes through modules, wrappers and custom_vjp as vjp does, with the gradients of "
    "inputs and parameters.",
    ("MOD-wrap-child", "CUSTOM-calls", "MOD-gradients"),
)
def backward(case: Case) -> None:
    module = _nested(case)
    handles = list(case.platform.parameters(module).values())
    _agree(case, module, [case.normal((3,), 1)], handles, case.normal((3,), 2))


@_requirement(
    "NATIVE-rows",
    "The framework's own backward goes through the row members, with the gradients of rows, weights and matrices.",
    ("NATIVE-backward", "SUM-rows-no-row", "SWIGLU-empty-group", "PERM-grad"),
    Capability.PERMUTE_ROWS,
    Capability.GROUPED_MATMUL,
)
def rows(case: Case) -> None:
    platform, order = case.platform, case.rng(1).permutation(6)
    index, inverse = case.tensor(order), case.tensor(np.argsort(order))
    two, sizes = case.xp.reshape(index, (3, 2)), case.tensor(np.array([4, 0, 2]))
    x, w, back = case.normal((6, 4), 1), case.normal((3, 5, 4), 2), case.normal((3, 4, 5), 3)
    table: dict[str, tuple[Callable[..., Any], list[np.ndarray], tuple[int, ...]]] = {
        "permute_rows": (lambda x: platform.permute_rows(x, index, inverse), [x], (6, 4)),
        "sum_rows": (lambda x, w: platform.sum_rows(x, two, inverse, w), [x, case.normal((3, 2), 4)], (3, 4)),
        "swiglu": (platform.swiglu, [x, case.normal((6, 4), 5)], (6, 4)),
        "grouped_matmul": (lambda x, w: platform.grouped_matmul(x, w, sizes), [x, w], (6, 5)),
        "grouped_swiglu": (
            lambda x, w1, w2, w3: platform.grouped_swiglu(x, w1, w2, w3, sizes),
            [x, w, back, case.normal((3, 5, 4), 6)],
            (6, 4),
        ),
    }
    for member, (function, inputs, shape) in table.items():
        case.note(member=member)
        _agree(case, function, inputs, [], case.normal(shape, 7))


@_requirement(
    "NATIVE-collectives",
    "The framework's own backward issues the collectives of the differentiable ones, on every rank.",
    ("NATIVE-backward", "A2A-grad-zero-rows", "COPY-grad", "REDUCE-grad"),
    Capability.ALL_TO_ALL,
    Capability.ALL_REDUCE,
)
def collectives(case: Case) -> None:
    platform, me = case.platform, case.rank
    splits = np.arange(case.ranks**2).reshape(case.ranks, case.ranks) % 3
    there, back = splits[me].tolist(), splits[:, me].tolist()
    x = case.normal((sum(there), 2), 1, me)
    _agree(
        case,
        lambda x: platform.differentiable_all_to_all_single(x, there, back),
        [x],
        [],
        case.normal((sum(back), 2), 2, me),
    )
    for member in (platform.copy_to_group, platform.reduce_from_group):
        _agree(case, lambda x, f=member: f(2 * x), [case.normal((3,), 3, me)], [], case.normal((3,), 4, me))


def _descended(case: Case, module: Any, inputs: list[np.ndarray], g: np.ndarray) -> None:
    """Demand that a step of the framework's optimizer is one along the gradients of ``vjp``, and nothing else."""
    platform, rate = case.platform, 0.25
    handles, buffers = platform.parameters(module), platform.buffers(module)
    for number in range(2):
        before = {name: case.host(platform.local(handle)) for name, handle in (handles | buffers).items()}
        _, gradients = case.gradients(module, inputs, g, list(handles.values()))
        tensors = [case.tensor(x) for x in inputs]
        _native(case).step(module, tensors, list(handles.values()), case.tensor(g), rate)
        for name, gradient in zip(handles, gradients[len(inputs) :], strict=True):
            want = before[name] - rate * gradient
            case.close(platform.local(handles[name]), want, f"{name} after step {number} of the optimizer", _TOLERANCE)
        for name, buffer in buffers.items():
            case.equal(platform.local(buffer), before[name], f"buffer {name} after step {number} of the optimizer")
        seen = case.host(module(*tensors))
        for handle in handles.values():
            platform.assign(handle, case.tensor(case.host(platform.local(handle))))
        case.close(
            module(*tensors), seen, f"output after step {number}, once the same values were assigned", _TOLERANCE
        )
    again = platform.parameters(module)
    for name, handle in again.items():
        case.equal(platform.local(handle), case.host(platform.local(handles[name])), f"{name} by a handle taken later")


@_requirement(
    "NATIVE-optimizer",
    "The framework's optimizer takes the handles of parameters: a step moves what local and the module see along the "
    "gradients, and no buffer.",
    ("NATIVE-backward",),
)
def optimizer(case: Case) -> None:
    _descended(case, _nested(case), [case.normal((3,), 1)], case.normal((3,), 2) / 8)


@_requirement(
    "NATIVE-state",
    "What the framework saves of a module holds every parameter and buffer by its path, and is loaded back by it.",
    ("NATIVE-backward", "MOD-assign"),
)
def state(case: Case) -> None:
    platform = case.platform
    module, other = _nested(case), _nested(case)
    handles = platform.parameters(module) | platform.buffers(module)
    saved = dict(_native(case).save(module))
    case.is_true(set(saved) == set(handles), f"saved are {sorted(saved)}, must be {sorted(handles)}")
    for name, handle in handles.items():
        case.equal(saved[name], case.host(platform.local(handle)), f"{name} as it was saved")
    others = platform.parameters(other) | platform.buffers(other)
    for handle in others.values():
        platform.assign(handle, case.tensor(np.full(3, 7, np.float32)))
    for name, array in saved.items():
        case.equal(array, case.host(platform.local(handles[name])), f"{name} as it was saved, later")
    _native(case).load(other, saved)
    for name, handle in others.items():
        case.equal(platform.local(handle), saved[name], f"{name} after it was loaded")
    x = case.tensor(case.normal((3,), 1))
    case.close(other(x), case.host(module(x)), "output of the module that was loaded")


@_requirement(
    "NATIVE-layer",
    "A layer with its experts sharded trains by the framework's own backward and optimizer as by vjp: gradients, two "
    "steps, and the parts of this rank in what is saved.",
    ("NATIVE-optimizer", "NATIVE-state", "NATIVE-rows", "NATIVE-collectives", "MOE-top2"),
    Capability.SHARDED_PARAMETERS,
    Capability.GROUPED_MATMUL,
    Capability.PERMUTE_ROWS,
    Capability.ALL_TO_ALL,
)
def layer(case: Case) -> None:
    platform = case.platform
    router = RouterConfig(num_experts=2 * case.ranks, top_k=2)
    moe = build_moe(platform, MoEConfig(dim=5, hidden_dim=8, router=router), seed=3)
    mesh = case.mesh((case.ranks,), ("ep",))
    hyperep.ExpertParallel().apply(platform.named_modules(moe)["experts"], mesh)
    x, g = case.normal((9, 5), 1, case.rank), case.normal((9, 5), 2, case.rank) / 8
    handles = platform.parameters(moe)
    _agree(case, moe, [x], list(handles.values()), g)
    _descended(case, moe, [x], g)
    saved = _native(case).save(moe)
    for name, handle in (handles | platform.buffers(moe)).items():
        case.is_true(name in saved, f"{name} is not saved")
        case.equal(saved[name], case.host(platform.local(handle)), f"this rank's part of {name} as it was saved")
