# SPDX-License-Identifier: Apache-2.0
"""The sharded surface by its values: what from_local, local and assign hold, and gradients that pass through them."""

from __future__ import annotations

from typing import Any

import numpy as np

import hyperep
from hyperep.conformance.bits import dtypes, same_bits, values
from hyperep.conformance.case import Case
from hyperep.conformance.memory import overwrite
from hyperep.conformance.requirement import Level, requirement
from hyperep.platform.capabilities import Capability
from hyperep.sharding import Sharding, gather_tensor

PORT = "modules"
_SHARDED = (Capability.MODULES, Capability.SHARDED_PARAMETERS)
_TRAINED = (*_SHARDED, Capability.AUTODIFF)


def _mesh(case: Case) -> Any:
    return case.mesh((case.ranks,), ("ep",))


def _holder(case: Case, w: np.ndarray, b: np.ndarray | None = None, dtype: str | None = None) -> Any:
    """A module with a parameter ``w``, and maybe a buffer ``b``, that multiplies by the one and adds the other."""
    buffers = {} if b is None else {"b": case.tensor(b, dtype)}
    forward = (lambda m, x: m.w * x) if b is None else (lambda m, x: m.w * x + m.b)
    return case.platform.make_module("Holder", {"w": case.tensor(w, dtype)}, forward, buffers=buffers)


@requirement(
    "DIST-values",
    "local and sharding of what from_local and distribute_tensor made tell this rank's part, with its dtype, and how "
    "it is laid out; put together the parts are the whole.",
    port=PORT,
    capabilities=(Capability.SHARDED_PARAMETERS, Capability.ALL_GATHER),
    needs=("DIST-tensor", "AG-bits"),
)
def distributed(case: Case) -> None:
    platform, mesh = case.platform, _mesh(case)
    shape = (2 * case.ranks, 3 * case.ranks)
    for dtype in dtypes(case):
        whole = values(case, dtype, shape)
        for placement in (hyperep.Shard(0), hyperep.Shard(1), hyperep.Replicate()):
            case.note(dtype=dtype, placement=repr(placement))
            sharding = Sharding(mesh, (placement,))
            part = whole[sharding.local_slices(shape)]
            made = {
                "from_local": platform.from_local(case.tensor(part, dtype), sharding),
                "distribute_tensor": hyperep.distribute_tensor(case.tensor(whole, dtype), mesh, [placement]),
            }
            for name, tensor in made.items():
                case.is_true(tuple(tensor.shape) == shape, f"{name}: shape is {tuple(tensor.shape)}, must be {shape}")
                told = platform.sharding(tensor)
                case.is_true(told == sharding, f"{name}: sharding is {told}, must be {sharding}")
                same_bits(case, platform.local(tensor), part, dtype, f"local of {name}")
                same_bits(case, gather_tensor(platform.local(tensor), told), whole, dtype, f"the whole of {name}")


@requirement(
    "DIST-first-rank",
    "distribute_tensor makes parts of the first rank's tensor, where ranks differ, over one mesh dimension or two.",
    port=PORT,
    level=Level.OPTIONAL,
    capabilities=(Capability.SHARDED_PARAMETERS, Capability.SUBGROUPS),
    needs=("DIST-values", "MESH-lines"),
)
def first_rank(case: Case) -> None:
    second = 2 if case.ranks % 2 == 0 else 1
    mesh = case.mesh((case.ranks // second, second), ("ep", "tp"))
    shape = (2 * case.ranks, 3 * case.ranks)
    shard, replicate = hyperep.Shard, hyperep.Replicate()
    for placements in ([shard(0), shard(1)], [shard(1), replicate], [replicate, shard(0)], [replicate, replicate]):
        case.note(placements=[repr(p) for p in placements], mesh=mesh.shape)
        made = hyperep.distribute_tensor(case.tensor(case.normal(shape, 1, case.rank)), mesh, placements)
        part = case.normal(shape, 1, 0)[Sharding(mesh, tuple(placements)).local_slices(shape)]
        case.equal(case.platform.local(made), part, "this rank's part")


@requirement(
    "DIST-gradients",
    "Gradients flow through from_local, and through local of what it made, unchanged.",
    port=PORT,
    capabilities=(Capability.SHARDED_PARAMETERS, Capability.AUTODIFF),
    needs=("DIST-values", "VJP-gradients"),
)
def distributed_gradients(case: Case) -> None:
    platform, mesh = case.platform, _mesh(case)
    x, g = (case.normal((2, 3), n, case.rank) for n in range(2))
    for placement in (hyperep.Shard(0), hyperep.Shard(1)):
        sharding = Sharding(mesh, (placement,))
        out, (gradient,) = case.gradients(
            lambda x, s=sharding: 3 * platform.local(platform.from_local(2 * x, s)), [x], g
        )
        case.close(out, 6 * x, "output")
        case.close(gradient, 6 * g, "gradient")


@requirement(
    "MOD-local-gradients",
    "Gradients flow through local: a function may read a parameter by its handle, sharded or not, and reach it through "
    "a module too.",
    port=PORT,
    capabilities=_TRAINED,
    needs=("SHARD-gradients",),
)
def local_gradients(case: Case) -> None:
    platform, shape = case.platform, (2 * case.ranks, 3)
    wide = case.supports(Capability.FLOAT64)
    for sharded, dtype in ((False, "float32"), (True, "float32"), *((s, "float64") for s in (False, True) if wide)):
        case.note(sharded=sharded, dtype=dtype)
        tolerance = 1e-5 if dtype == "float32" else 1e-14

        def normal(shape: tuple[int, ...], *key: int, of: str = dtype) -> np.ndarray:
            return case.rng(*key).normal(size=shape).astype(of)

        w = normal(shape, 1)
        module = _holder(case, w)
        if sharded:
            hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)])
        handle = platform.parameters(module)["w"]
        part = np.split(w, case.ranks)[case.rank] if sharded else w
        x, g = (normal(part.shape, n, case.rank) for n in (2, 3))

        def function(x: Any, module: Any = module, handle: Any = handle) -> Any:
            return platform.local(handle) * platform.local(handle) * x + module(x)

        out, (gx, gw) = case.gradients(function, [x], g, [handle])
        case.close(out, part * part * x + part * x, "output", tolerance)
        case.close(gx, g * (part * part + part), "gradient of the input", tolerance)
        what = "gradient of the parameter, read by its handle and by its module"
        case.close(gw, g * (2 * part * x + x), what, tolerance)
        case.is_true(tuple(gw.shape) == part.shape, f"the gradient has shape {gw.shape}")


@requirement(
    "SHARD-assign-values",
    "assign of a sharded parameter or buffer keeps its dtype and copies: also from a transposed view, from another "
    "dtype, and from what somebody writes to later.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-assign", "MOD-own-memory"),
)
def assign_values(case: Case) -> None:
    platform, xp, shape = case.platform, case.xp, (2 * case.ranks, 3)
    module, mesh = _holder(case, case.normal(shape, 1), case.normal(shape, 2)), _mesh(case)
    for name in ("w", "b"):
        hyperep.distribute_parameter(module, name, mesh, [hyperep.Shard(0)])
    handles = {"w": platform.parameters(module)["w"], "b": platform.buffers(module)["b"]}
    x = case.normal((2, 3), 3)
    held = {name: np.split(case.normal(shape, n), case.ranks)[case.rank] for n, name in enumerate(handles, start=1)}
    for name, handle in handles.items():
        case.note(name=name)
        want = Sharding(mesh, (hyperep.Shard(0),))
        case.is_true(platform.sharding(handle) == want, f"sharding of {name} is {platform.sharding(handle)}")
        case.equal(platform.local(handle), held[name], f"this rank's part of {name}")
        new = case.normal((3, 2), 4, case.rank)
        base = case.tensor(new)
        platform.assign(handle, xp.permute_dims(base, (1, 0)))
        case.equal(platform.local(handle), new.T, f"{name} after a transposed view was assigned")
        if overwrite(base, 77):
            case.equal(platform.local(handle), new.T, f"{name} after the tensor that was assigned was written to")
        whole = case.rng(5, case.rank).integers(-9, 9, size=(2, 3))
        platform.assign(handle, case.tensor(whole))
        case.equal(platform.local(handle), whole.astype(np.float32), f"{name} after integers were assigned")
        held[name] = whole.astype(np.float32)
        if case.supports(Capability.FLOAT64):
            platform.assign(handle, case.tensor(held[name].astype(np.float64)))
            got = case.host(platform.local(handle))
            case.is_true(got.dtype == np.float32, f"{name} is {got.dtype} after float64 was assigned, must be float32")
            case.equal(got, held[name], f"{name} after float64 was assigned")
        for wrong in ((3, 2), shape if case.ranks > 1 else (3, 3), (1, 3)):
            value = case.tensor(np.zeros(wrong, np.float32))
            case.raises(Exception, lambda h=handle, v=value: platform.assign(h, v))  # type: ignore[misc]
        case.equal(platform.local(handle), held[name], f"{name} after values of wrong shapes were refused")
    case.close(module(case.tensor(x)), held["w"] * x + held["b"], "output of the module")


@requirement(
    "MOD-assign-while-differentiated",
    "assign inside a function that is differentiated writes the value of a tensor, and is not recorded.",
    port=PORT,
    capabilities=(Capability.MODULES, Capability.AUTODIFF),
    needs=("MOD-assign", "MOD-gradients", "STOP-gradient"),
)
def assign_recorded(case: Case) -> None:
    platform = case.platform
    w, b, x, g = (case.normal((3,), n) for n in range(4))
    module = _holder(case, w, b)
    handles = platform.parameters(module)["w"], platform.buffers(module)["b"]

    def function(x: Any) -> Any:
        out = module(x)
        platform.assign(handles[1], platform.stop_gradient(2 * x))
        platform.assign(handles[1], 3 * x)
        return out + platform.local(handles[1])

    out, (gx, gw) = case.gradients(function, [x], g, [handles[0]])
    case.close(out, w * x + b + 3 * x, "output, of the buffer as it was and as it is now")
    case.close(gx, g * w, "gradient of the input")
    case.close(gw, g * x, "gradient of the parameter")
    case.close(platform.local(handles[1]), 3 * x, "the buffer")


@requirement(
    "SHARD-attributes",
    "A shard keeps the attributes that somebody has set on its parameter.",
    port=PORT,
    capabilities=_SHARDED,
    needs=("SHARD-parameter",),
)
def attributes(case: Case) -> None:
    module = _holder(case, case.normal((2 * case.ranks, 3), 1))
    handle = case.platform.parameters(module)["w"]
    handle.decay_factor = 0.25
    hyperep.distribute_parameter(module, "w", _mesh(case), [hyperep.Shard(0)])
    shard = case.platform.parameters(module)["w"]
    kept = getattr(shard, "decay_factor", None)
    case.is_true(kept == 0.25, f"an attribute that was set to 0.25 before sharding is {kept} on the shard")
