# SPDX-License-Identifier: Apache-2.0
"""Serve the device's kernels with the CPU's.

torch_npu registers some 1500 aten kernels for its device, which all end in CANN's operators. Here each is replaced by
one that waits for the current stream, looks at its NPU tensors as CPU tensors over the same bytes, runs the CPU's
kernel, and uploads what is new. Allocation, views, autograd formulas, streams, events and collectives stay torch_npu's.

A kernel therefore runs in stream order, like on hardware, but the host waits for it. What remains asynchronous, as on
hardware, is what the C libraries enqueue: collectives, and non-blocking copies to the host.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree

from ascend_emulator.torch_kernels.alias import alias, is_npu, upload
from ascend_emulator.torch_kernels.copies import copy_, to_copy
from ascend_emulator.torch_kernels.custom import CUSTOM_KERNELS, check_schemas
from ascend_emulator.torch_kernels.order import wait_for_stream

KEY = "PrivateUse1"

# Left to torch_npu: factories and views, which only touch metadata and the allocator.
KEPT = frozenset(
    (
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "is_set_to"),
        *("is_pinned", "_pin_memory", "record_stream", "detach", "alias", "lift_fresh", "_reshape_alias", "as_strided"),
        *("view", "view_as_real", "view_as_complex", "unfold", "transpose", "permute", "expand", "slice", "select"),
        *("split", "squeeze", "unsqueeze"),
    )
)

# Composite operators that torch_npu differentiates by formulas of its own, around kernels that it calls without the
# dispatcher. Here they are what they are on every other device: made of operators that are served.
COMPOSITE = (
    *("matmul", "where", "contiguous", "one_hot", "argsort", "argsort.stable", "softmax.int", "log_sigmoid"),
    *("repeat_interleave.self_int", "repeat_interleave.self_Tensor", "kl_div", "l1_loss"),
    "scaled_dot_product_attention",
)

COPIES: dict[str, Callable[..., Any]] = {"copy_": copy_, "_to_copy": to_copy}

_library: list[torch.library.Library] = []


def serve() -> None:
    """Replace the kernels, once in a process. Needs torch_npu imported."""
    if _library:
        return
    check_schemas()
    aten = torch.library.Library("aten", "IMPL")
    npu = torch.library.Library("npu", "IMPL")
    _library.extend((aten, npu))
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(KEY):
        namespace, _, name = qualified.partition("::")
        if namespace == "aten" and name.partition(".")[0] not in KEPT:
            operator = find_operator(name)
            if operator is not None:
                aten.impl(name, COPIES.get(name) or cpu_kernel(operator), KEY)
    for name in COMPOSITE:
        operator = find_operator(name)
        if operator is not None and operator.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
            aten.impl(name, operator.decompose, "AutogradPrivateUse1")
    for name, kernel in CUSTOM_KERNELS.items():
        npu.impl(name, in_stream_order(kernel), KEY)


def find_operator(name: str) -> torch._ops.OpOverload | None:
    """The aten operator called *name*, as `add.Tensor`; None if torch has none: torch_npu adds names to aten."""
    base, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.aten, base), overload or "default")
    except AttributeError:
        return None


def in_stream_order(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel over CPU tensors, as a kernel over NPU tensors that runs when its stream's earlier work is done."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = device_of((args, kwargs))
        wait_for_stream(device)
        made = kernel(*pytree.tree_map(alias, args), **pytree.tree_map(alias, kwargs))
        return pytree.tree_map(lambda value: upload(value, device), made)

    return run


def device_of(values: object) -> torch.device:
    """The device of the first NPU tensor among the leaves of *values*, or else the current device."""
    for leaf in pytree.tree_leaves(values):
        if is_npu(leaf):
            return leaf.device
    return torch.device("npu", torch.npu.current_device())


def cpu_kernel(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The CPU's kernel of an aten operator, as a kernel for NPU tensors."""
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]
    written = [argument.name for argument in schema.arguments if _is_written(argument)]
    returns_written = any(_is_written(result) for result in schema.returns)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        device = device_of(given)
        wait_for_stream(device)
        on_cpu = pytree.tree_map(alias, given)
        wanted = given.get("device")
        if "device" in names:
            on_cpu["device"] = torch.device("cpu")
        if is_npu_generator(given.get("generator")):
            on_cpu["generator"] = cpu_generator(given["generator"])
        positional = [on_cpu.pop(name) for name in names[: len(args)]]
        result = operator(*positional, **on_cpu)
        looked_at = dict(zip(names, positional, strict=False)) | on_cpu
        for name in written:
            _follow_resize(given.get(name), looked_at.get(name))
        if returns_written:
            results = [given[name] for name in written if given.get(name) is not None]
            return results[0] if len(results) == 1 else tuple(results)
        if wanted is not None and torch.device(wanted).type == "cpu":
            return result
        if wanted is not None:
            device = torch.device("npu", torch.device(wanted).index or device.index or 0)
        return pytree.tree_map(lambda value: upload(value, device), result)

    return run


def _is_written(value: Any) -> bool:
    return value.alias_info is not None and value.alias_info.is_write


def _follow_resize(tensor: object, on_cpu: object) -> None:
    """Resize an NPU tensor whose alias the CPU's kernel resized (an `out=` argument), and bring the values over."""
    if is_npu(tensor) and isinstance(on_cpu, torch.Tensor) and tensor.shape != on_cpu.shape:  # type: ignore[attr-defined]
        tensor.resize_(on_cpu.shape)  # type: ignore[attr-defined]
        alias(tensor).copy_(on_cpu)  # type: ignore[attr-defined]


def is_npu_generator(value: object) -> bool:
    """Whether a value is a random number generator of an emulated device."""
    return isinstance(value, torch.Generator) and value.device.type == "npu"


@cache
def _twin(generator: torch.Generator, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """The CPU generator that draws in place of an NPU generator: seeded alike, and drawing on from call to call."""
    return _twin(generator, generator.initial_seed())
