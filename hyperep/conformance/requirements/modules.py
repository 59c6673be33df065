# SPDX-License-Identifier: Apache-2.0
"""Native modules around a neutral forward, their parameters, and how these are sharded."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

import hyperep
from hyperep.conformance.case import Case
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability
from hyperep.sharding import Sharding, gather_tensor, whole_shape

PORT = "modules"
_MODULES = (Capability.MODULES,)
_TRAINED = (Capability.MODULES, Capability.AUTODIFF)
_SHARDED = (Capability.MODULES, Capability.SHARDED_PARAMETERS)
_OTHER_DTYPES = (Capability.FLOAT64, Capability.FLOAT16, Capability.BFLOAT16)
"""Besides float32; the one that tells most on the host, where bfloat16 is seen as float32, comes first."""


def _scale(case: Case, values: np.ndarray, name: str = "Scale") -> Any:
    """A module that multiplies by its parameter ``w`` and adds its buffer ``b``."""
    return case.platform.make_module(
        name,
        {"w": case.tensor(values)},
        lambda m, x, *, times=1: m.w * x * times + m.b,
        buffers={"b": case.tensor(np.ones_like(values))},
        description="scale by w",
    )


def _pair(case: Case) -> tuple[Any, np.ndarray, np.ndarray]:
    """A module with two children, one of which is nested."""
    first, second = case.normal((3,), 21), case.normal((3,), 22)
    inner = case.platform.make_module(
        "Inner", {}, lambda m, x: m.scale(x, times=2), children={"scale": _scale(case, second)}
    )
    outer = case.platform.make_module(
        "Outer", {}, lambda m, x: m.inner(m.first(x)), children={"first": _scale(case, first), "inner": inner}
    )
    return outer, first, second


@requirement(
    "MOD-call",
    "Calling a module calls its forward with the local tensors; positional and keyword arguments arrive.",
    port=PORT,
    capabilities=_MODULES,
    needs=("HOST-roundtrip",),
)
def call(case: Case) -> None:
    w, x = case.normal((3,), 1), case.normal((3,), 2)
    module = _scale(case, w)
    case.close(module(case.tensor(x)), w * x + 1, "output")
    case.close(module(case.tensor(x), times=4), w * x * 4 + 1, "output with a keyword argument")


@requirement(
    "MOD-children",
    "A module's children are called by name, and may be nested.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-call",),
)
def children(case: Case) -> None:
    module, first, second = _pair(case)
    x = case.normal((3,), 2)
    case.close(module(case.tensor(x)), second * (first * x + 1) * 2 + 1, "output")


@requirement(
    "MOD-paths",
    "named_modules, parameters and buffers list everything by dotted path, the module itself under ''.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-children",),
)
def paths(case: Case) -> None:
    module, first, second = _pair(case)
    platform = case.platform
    listed = platform.named_modules(module)
    case.is_true(set(listed) == {"", "first", "inner", "inner.scale"}, f"named_modules lists {sorted(listed)}")
    case.is_true(listed[""] is module, "the module itself is not under ''")
    parameters, buffers = platform.parameters(module), platform.buffers(module)
    case.is_true(set(parameters) == {"first.w", "inner.scale.w"}, f"parameters lists {sorted(parameters)}")
    case.is_true(set(buffers) == {"first.b", "inner.scale.b"}, f"buffers lists {sorted(buffers)}")
    case.equal(platform.local(parameters["first.w"]), first, "the first parameter")
    case.equal(platform.local(parameters["inner.scale.w"]), second, "the nested parameter")
    case.equal(platform.local(buffers["first.b"]), np.ones_like(first), "a buffer")
    for name, parameter in parameters.items():
        shape = tuple(platform.local(parameter).shape)
        case.is_true(shape == (3,), f"{name} has shape {shape}")
    again = {**platform.parameters(module), **platform.buffers(module)}
    for name, handle in {**parameters, **buffers}.items():
        case.is_true(
            again[name] is handle, f"{name} is another object at the next call; a parameter must be one object"
        )
        try:
            weakref.ref(handle)
        except TypeError as error:
            raise AssertionError(
                f"{name} must allow weak references, for class {type(handle).__name__}: {error}"
            ) from error


@requirement(
    "MOD-gradients",
    "vjp gives the gradient of each parameter that it is handed, in their order; buffers are constants.",
    port=PORT,
    capabilities=_TRAINED,
    needs=("MOD-paths", "VJP-unused"),
)
def gradients(case: Case) -> None:
    module, first, second = _pair(case)
    x, g = case.normal((3,), 2), case.normal((3,), 3)
    parameters = case.platform.parameters(module)
    handles = [parameters["inner.scale.w"], parameters["first.w"]]
    _, (gx, g_second, g_first) = case.gradients(module, [x], g, handles)
    case.close(gx, g * 2 * second * first, "gradient of the input")
    case.close(g_second, g * 2 * (first * x + 1), "gradient of the nested parameter")
    case.close(g_first, g * 2 * second * x, "gradient of the first parameter")


@requirement(
    "MOD-unused-parameter",
    "A parameter that no output depends on gets a gradient of zeros.",
    port=PORT,
    capabilities=_TRAINED,
    needs=("MOD-gradients",),
)
def unused(case: Case) -> None:
    values = {"used": case.tensor(case.normal((2,), 1)), "unused": case.tensor(case.normal((4,), 2))}
    module = case.platform.make_module("Idle", values, lambda m, x: m.used * x)
    handles = case.platform.parameters(module)
    _, (_, gradient) = case.gradients(module, [case.normal((2,), 3)], case.normal((2,), 4), [handles["unused"]])
    case.equal(gradient, np.zeros(4, np.float32), "gradient of the unused parameter")


@requirement(
    "MOD-assign",
    "assign overwrites a parameter in place: the module and handles taken before see the new value, and the parameter "
    "keeps its dtype.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-paths",),
)
def assign(case: Case) -> None:
    module = _scale(case, case.normal((3,), 1))
    handle = case.platform.parameters(module)["w"]
    new = case.normal((3,), 2)
    case.platform.assign(handle, case.tensor(new))
    case.equal(case.platform.local(handle), new, "the parameter, by the old handle")
    x = case.normal((3,), 3)
    case.close(module(case.tensor(x)), new * x + 1, "the module's output")
    buffer = case.platform.buffers(module)["b"]
    case.platform.assign(buffer, case.tensor(new))
    case.close(module(case.tensor(x)), new * x + new, "the module's output after its buffer was assigned")
    dtype = next((c.value for c in _OTHER_DTYPES if case.supports(c)), None)
    if dtype is not None:
        whole = np.array([1, -2, 3], np.float32)  # exact in all of them
        for kind, tensor in (("parameter", handle), ("buffer", buffer)):
            case.platform.assign(tensor, case.tensor(whole, dtype))
            case.equal(case.platform.local(tensor), whole, f"the {kind} after a value in {dtype} was assigned")


@requirement(
    "MOD-own-values",
    "Two modules made from the same tensors do not share parameters.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-assign",),
)
def own_values(case: Case) -> None:
    values = case.normal((3,), 1)
    tensor = case.tensor(values)
    one, two = (case.platform.make_module("M", {"w": tensor}, lambda m, x: m.w * x) for _ in range(2))
    case.platform.assign(case.platform.parameters(one)["w"], case.tensor(-values))
    case.equal(case.platform.local(case.platform.parameters(two)["w"]), values, "the other module's parameter")
    case.equal(tensor, values, "the tensor that both were made from")


@dataclass(frozen=True)
class _Outputs:
    value: Any
    note: str


@requirement(
    "MOD-any-output",
    "A forward may return tuples and records, and the caller gets just that.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-call",),
)
def any_output(case: Case) -> None:
    x = case.normal((3,), 1)
    pair = case.platform.make_module("Pair", {}, lambda m, x: (x, 2 * x))(case.tensor(x))
    case.is_true(isinstance(pair, tuple) and len(pair) == 2, f"a pair came out as {type(pair).__name__}")
    record = case.platform.make_module("Record", {}, lambda m, x: _Outputs(3 * x, "kept"))(case.tensor(x))
    case.is_true(isinstance(record, _Outputs) and record.note == "kept", f"a record came out as {record!r:.80}")
    case.close(record.value, 3 * x, "a value in a record")


@requirement(
    "MOD-wrap",
    "wrap_forward wraps what a call does; wrappers nest, the last one outermost, and keep keyword arguments.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-call",),
)
def wrap(case: Case) -> None:
    w, x = case.normal((3,), 1), case.normal((3,), 2)
    module = _scale(case, w)
    order: list[str] = []

    def wrapper(name: str, add: float) -> Any:
        def wrapped(inner: Any, x: Any, **kwargs: Any) -> Any:
            order.append(f"enter {name}")
            out = inner(x + add, **kwargs)
            order.append(f"leave {name}")
            return 2 * out

        return wrapped

    case.platform.wrap_forward(module, wrapper("inner", 1.0))
    case.platform.wrap_forward(module, wrapper("outer", 10.0))
    out = module(case.tensor(x), times=3)
    case.close(out, 4 * (w * (x + 11) * 3 + 1), "output")
    want = ["enter outer", "enter inner", "leave inner", "leave outer"]
    case.is_true(order == want, f"the wrappers ran in the order {order}, must be {want}")


@requirement(
    "MOD-wrap-child",
    "A wrapper around a child is used when the parent calls it, and only on that module.",
    port=PORT,
    capabilities=_MODULES,
    needs=("MOD-wrap", "MOD-paths"),
)
def wrap_child(case: Case) -> None:
    module, first, second = _pair(case)
    other, *_ = _pair(case)
    child = case.platform.named_modules(module)["inner.scale"]
    case.platform.wrap_forward(child, lambda inner, x, **kwargs: -inner(x, **kwargs))
    x = case.normal((3,), 2)
    want = second * (first * x + 1) * 2 + 1
    case.close(module(case.tensor(x)), -want, "output with the child wrapped")
    case.close(other(case.tensor(x)), want, "output of another module of the same making")


@requirement(
    "MOD-prints",
    "A module prints the name and the description that it was made with.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=_MODULES,
    needs=("MOD-call",),
)
def prints(case: Case) -> None:
    text = repr(_scale(case, case.normal((3,), 1), "Scaling"))
    case.is_true("Scaling" in text and "scale by w" in text, f"the module prints {text!r}")


# ---------------------------------------------------------------------------------------------------------- sharding
def _mesh(case: Case, two: bool = False) -> Any:
    if not two:
        return case.mesh((case.ranks,), ("ep",))
    second = 2 if case.ranks % 2 == 0 else 1
    return case.mesh((case.ranks // second, second), ("ep", "tp"))


def _linear(case: Case, shape: tuple[int, ...], *key: int) -> tuple[Any, np.ndarray]:
    values = case.normal(shape, *key)
    module = case.platform.make_module("Linear", {"w": case.tensor(values)}, lambda m, x: case.xp.sum(m.w * x))
    return module, values


@requirement(
    "SHARD-parameter",
    "A sharded parameter tells its sharding, from which its whole shape follows, and holds this rank's part.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("MOD-paths", "BC-values"),
)
def shard_parameter(case: Case) -> None:
    mesh, platform = _mesh(case), case.platform
    for dim in (0, 1):
        module, values = _linear(case, (4 * case.ranks, 2 * case.ranks), dim)
        before = platform.sharding(platform.parameters(module)["w"])
        case.is_true(before is None, f"a parameter that was never distributed has the sharding {before}")
        hyperep.distribute_parameter(module, "w", mesh, [hyperep.Shard(dim)])
        handle = platform.parameters(module)["w"]
        case.note(dim=dim)
        shape = whole_shape(platform, handle)
        case.is_true(shape == values.shape, f"the parameter's shape is {shape}")
        want = Sharding(mesh, (hyperep.Shard(dim),))
        case.is_true(platform.sharding(handle) == want, f"sharding is {platform.sharding(handle)}, must be {want}")
        case.equal(platform.local(handle), np.split(values, case.ranks, axis=dim)[case.rank], "this rank's part")


@requirement(
    "SHARD-first-rank",
    "Shards are parts of the first rank's tensor, also where ranks began with different values.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-parameter",),
)
def shard_first_rank(case: Case) -> None:
    module, _ = _linear(case, (2 * case.ranks, 3), 7, case.rank)
    hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)])
    first = case.normal((2 * case.ranks, 3), 7, 0)
    local = case.platform.local(case.platform.parameters(module)["w"])
    case.equal(local, np.split(first, case.ranks)[case.rank], "this rank's part")


@requirement(
    "SHARD-gradients",
    "The gradient of a sharded parameter is that of this rank's part; the forward sees the part.",
    port=PORT,
    capabilities=(*_SHARDED, Capability.AUTODIFF),
    needs=("SHARD-parameter", "MOD-gradients"),
)
def shard_gradients(case: Case) -> None:
    module, values = _linear(case, (2 * case.ranks, 3), 1)
    hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)])
    x = case.normal((2, 3), 2, case.rank)
    handle = case.platform.parameters(module)["w"]
    part = np.split(values, case.ranks)[case.rank]
    out, (gx, gw) = case.gradients(module, [x], np.array(2, np.float32), [handle])
    case.close(out, np.asarray((part * x).sum()), "output")
    case.close(gx, 2 * part, "gradient of the input")
    case.close(gw, 2 * x, "gradient of this rank's part")


@requirement(
    "SHARD-assign",
    "assign and local work on this rank's part of a sharded parameter.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-parameter", "MOD-assign"),
)
def shard_assign(case: Case) -> None:
    module, _ = _linear(case, (2 * case.ranks, 3), 1)
    hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)])
    handle = case.platform.parameters(module)["w"]
    new = case.normal((2, 3), 2, case.rank)
    case.platform.assign(handle, case.tensor(new))
    case.equal(case.platform.local(case.platform.parameters(module)["w"]), new, "this rank's part")


@requirement(
    "SHARD-gather",
    "Parts of a tensor sharded over one or two mesh dimensions, in any dims, are put together again as they were.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(Capability.MODULES, Capability.SHARDED_PARAMETERS, Capability.SUBGROUPS),
    needs=("SHARD-parameter", "MESH-lines"),
)
def shard_gather(case: Case) -> None:
    shard, replicate = hyperep.Shard, hyperep.Replicate()
    shape = (2 * case.ranks, 3 * case.ranks, 2)
    mesh = _mesh(case, two=True)
    for placements in ([shard(0), shard(1)], [shard(1), shard(1)], [shard(0), replicate], [replicate, shard(1)]):
        case.note(placements=[repr(p) for p in placements], mesh=mesh.shape)
        module, values = _linear(case, shape, 1)
        hyperep.distribute_parameter(module, "w", mesh, placements)
        handle = case.platform.parameters(module)["w"]
        sharding = case.platform.sharding(handle)
        case.is_true(sharding == Sharding(mesh, tuple(placements)), f"sharding is {sharding}")
        local = case.platform.local(handle)
        case.equal(local, values[Sharding(mesh, tuple(placements)).local_slices(shape)], "this rank's part")
        case.equal(gather_tensor(local, sharding), values, "the whole, put together")


@requirement(
    "SHARD-twice",
    "A parameter that is distributed already is refused, with a message that names it.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-parameter",),
)
def shard_twice(case: Case) -> None:
    module, _ = _linear(case, (2 * case.ranks, 3), 1)
    mesh = _mesh(case)
    hyperep.distribute_parameter(module, "w", mesh, [hyperep.Shard(0)])
    case.raises(
        ValueError, lambda: hyperep.distribute_parameter(module, "w", mesh, [hyperep.Shard(0)]), "'w'", "already"
    )


@requirement(
    "SHARD-indivisible",
    "A dim that does not divide by the ranks is an error on every rank, never padded.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-parameter",),
    min_ranks=2,
)
def shard_indivisible(case: Case) -> None:
    module, values = _linear(case, (2 * case.ranks + 1, 3), 1)
    case.raises(
        ValueError, lambda: hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)]), "divisible"
    )
    case.equal(case.platform.local(case.platform.parameters(module)["w"]), values, "the parameter, after the error")


@requirement(
    "DIST-tensor",
    "distribute_tensor makes the framework's distributed tensor, of whole shape, from the first rank's tensor.",
    port=PORT,
    capabilities=(Capability.SHARDED_PARAMETERS,),
    needs=("BC-values",),
)
def distribute_tensor(case: Case) -> None:
    mesh = _mesh(case)
    own = case.normal((2 * case.ranks, 3), case.rank)
    for placement in (hyperep.Shard(0), hyperep.Replicate()):
        made = hyperep.distribute_tensor(case.tensor(own), mesh, [placement])
        case.is_true(tuple(made.shape) == own.shape, f"{placement}: shape is {tuple(made.shape)}")


@requirement(
    "DIST-module",
    "distribute_module converts inputs and outputs around the forward, and passes keyword arguments on.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("MOD-wrap", "SHARD-parameter"),
)
def distribute_module(case: Case) -> None:
    w, x = case.normal((3,), 1), case.normal((3,), 2)
    module, mesh = _scale(case, w), _mesh(case)
    hyperep.distribute_module(
        module,
        mesh,
        input_fn=lambda module, inputs, mesh: (inputs[0] * 2,),
        output_fn=lambda module, outputs, mesh: outputs - 1,
    )
    case.close(module(case.tensor(x), times=5), w * x * 10, "output")
