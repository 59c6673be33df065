# SPDX-License-Identifier: Apache-2.0
"""Slices of sharded tensors that can be written to: the shape of the whole slice, and the memory of this rank's part.

``DTensor[e]`` is a copy where dim 0 is sharded, and what is written to it is lost. A :class:`Slice` is a view, as that
of a plain tensor is, also of another slice; operations by element are done on this rank's part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_leaves, tree_map

from hyperep_torch.counted import Start, start_of

__all__ = ["Box", "Root", "Slice", "by_parts", "covered", "is_by_element", "is_even", "sliced", "starts_of", "taken"]

Box = tuple[tuple[int, int, int], ...]
"""For each dim of a tensor the start, step and count of the indices that a slice takes."""

_BY_ELEMENT = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy",
        "clone",
        "copy_",
        "empty_like",
        "fill_.Scalar",
        "fill_.Tensor",
        "full_like",
        "ones_like",
        "zero_",
        "zeros_like",
    )
)
"""Beside those that PyTorch tags as pointwise."""

_OF_ANY_SHAPE = frozenset(f"aten::{name}" for name in ("new_empty", "new_full", "new_ones", "new_zeros"))
"""They take of a tensor its dtype and device alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """A sharded tensor of which slices are taken."""

    name: str
    """The parameter, or that of whose values this one is made."""
    local: torch.Tensor
    shape: tuple[int, ...]
    starts: tuple[Start, ...]
    mesh: Any
    cut: object
    """Equal where tensors of one shape lie alike."""
    parted: bool
    """Whether what a rank has of it may be of several parts."""
    path: str | None = None
    """That of the parameter, if this is its memory."""

    @classmethod
    def of(cls, tensor: DTensor, name: str, path: str | None) -> Root:
        """That of a DTensor."""
        mesh, shape, placements = tensor.device_mesh, tuple(tensor.shape), tuple(tensor.placements)
        parted = any(isinstance(placement, _StridedShard) for placement in placements)
        cut = (mesh, shape, placements)
        return cls(name, tensor._local_tensor, shape, starts_of(tensor), mesh, cut, parted, path)


class Slice(torch.Tensor):
    """A view of a :class:`Root`; ``on_meta`` is the same view of a tensor on ``meta`` of the whole's shape."""

    root: Root
    on_meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, root: Root, on_meta: torch.Tensor) -> Slice:
        """It has no memory of its own."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            on_meta.shape,
            strides=on_meta.stride(),
            storage_offset=on_meta.storage_offset(),
            dtype=root.local.dtype,
            device=root.local.device,
        )
        made.root, made.on_meta = root, on_meta
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Slice({tuple(self.shape)} of {self.root.name})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"a slice of a sharded parameter is used by {func.name()} after init_weights")

    def box(self) -> Box | None:
        """Which elements of the root it has; ``None`` where dims of the root are merged or split."""
        found = _box(self.on_meta, self.root.shape)
        return None if found is None else found[0]

    def cut(self) -> object:
        """Equal where slices of one shape have their elements on the same ranks."""
        if self.on_meta.is_contiguous() and tuple(self.shape) == self.root.shape:
            return self.root.cut
        return self.root.cut, _box(self.on_meta, self.root.shape)

    def part(self) -> tuple[torch.Tensor, tuple[Start, ...]]:
        """This rank's part, a view of its memory, and where in the slice that lies.

        A single number that another rank has is a number here too, which nobody reads.
        """
        found = _box(self.on_meta, self.root.shape)
        # Every second number of parts may lie anyhow on some rank, and is refused on all.
        if found is None or (self.root.parted and any(step > 1 for _, step, _ in found[0])):
            raise NotImplementedError
        box, dims = found
        part, starts = self.root.local, []
        for dim, (wanted, start) in enumerate(zip(box, self.root.starts, strict=True)):
            where, first = _held(wanted, start, part.shape[dim])
            part = part[(slice(None),) * dim + (where,)]
            starts.append(first)
        fixed = [dim for dim in range(part.ndim) if dim not in dims]
        if not part.numel():
            return self.root.local.new_empty((0,) * self.ndim), (0,) * self.ndim
        part = part.permute(*fixed, *(dim for dim in dims if dim is not None))[(0,) * len(fixed)]
        for view_dim, dim in enumerate(dims):
            if dim is None:
                part = part.unsqueeze(view_dim)
        return part, tuple(0 if dim is None else starts[dim] for dim in dims)


def taken(func: Any, source: Slice | Root, args: Sequence[Any], kwargs: Any) -> Any:
    """What the view *func* makes of *source*, its first argument: a slice or several."""
    source = source if isinstance(source, Slice) else sliced(source)
    views = func(source.on_meta, *args[1:], **kwargs)
    if any(view.dtype != source.dtype for view in tree_leaves(views)):
        raise NotImplementedError
    return tree_map(lambda view: Slice(source.root, view), views)


def sliced(root: Root) -> Slice:
    """All of it."""
    return Slice(root, torch.empty(root.shape, dtype=root.local.dtype, device="meta"))


def is_by_element(func: Any) -> bool:
    """Whether each element of the result depends on the elements in its place alone."""
    return torch.Tag.pointwise in func.tags or func.name() in _BY_ELEMENT


def by_parts(func: Any, args: Any, kwargs: Any, written: Sequence[Any]) -> Any:
    """*func* of tensors among which there are slices, on this rank's parts.

    Raises:
        NotImplementedError: it cannot be told from the parts.
    """
    slices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Slice)]
    name, first = func.name(), next((t for t in written if isinstance(t, Slice)), slices[0])
    if name in _OF_ANY_SHAPE:
        return func(torch.empty(0, dtype=first.dtype, device=first.device), *args[1:], **kwargs)
    if name in ("aten::any", "aten::all"):
        return _over_ranks(func, first)
    alike = all(one.shape == first.shape and one.cut() == first.cut() for one in slices)
    if not is_by_element(func) or not alike:
        raise NotImplementedError
    part, starts = first.part()

    def here(value: Any) -> Any:
        if isinstance(value, Slice):
            return value.part()[0]
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        if torch.broadcast_shapes(value.shape, first.shape) != first.shape:
            raise NotImplementedError
        value = value.expand(first.shape)
        for dim, (start, count) in enumerate(zip(starts, part.shape, strict=True)):
            value = (
                value.narrow(dim, start, count) if isinstance(start, int) else value[(slice(None),) * dim + (start,)]
            )
        return value

    made = func(*tree_map(here, args), **tree_map(here, kwargs))
    if written:
        return first
    root = first.root
    return sliced(Root(root.name, made, tuple(first.shape), starts, root.mesh, first.cut(), root.parted))


def is_even(tensor: DTensor) -> bool:
    """Whether parts of all ranks have one shape."""
    sizes = list(tensor.shape)
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard | _StridedShard):
            sizes[placement.dim], rest = divmod(sizes[placement.dim], tensor.device_mesh.size(number))
            if rest:
                return False
    return True


def starts_of(tensor: DTensor) -> tuple[Start, ...]:
    """Where in the whole this rank's part lies, see :func:`hyperep_torch.counted.fill`."""
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(f"init_weights: a parameter has the layout {tensor.placements}, and so no values of its own")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(tensor._local_tensor.shape), (shape, tensor._local_tensor.shape)
    starts: list[Start] = list(offset)
    for dim in {p.dim for p in tensor.placements if isinstance(p, _StridedShard)}:
        # It may be of several parts; PyTorch tells where the first one begins alone.
        along = [_along(placement, dim) for placement in tensor.placements]
        every = torch.arange(tensor.shape[dim], device=tensor.device)
        starts[dim] = start_of(distribute_tensor(every, tensor.device_mesh, along, src_data_rank=None)._local_tensor)
    return tuple(starts)


def _along(placement: Any, dim: int) -> Any:
    """What it does to the indices of a dim."""
    if getattr(placement, "dim", None) != dim:
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor)
    return type(placement)(0)


def covered(shape: Sequence[int], boxes: set[Box]) -> bool:
    """Whether *boxes* have all elements of a tensor of this shape."""
    if tuple((0, 1, size) for size in shape) in boxes or 0 in shape:
        return True
    # Indices between which no box begins or ends stand for each other.
    numbers: list[dict[int, int]] = []
    for dim, size in enumerate(shape):
        edges = {0, size}.union(*(_edges(*box[dim]) for box in boxes))
        numbers.append({edge: number for number, edge in enumerate(sorted(edges))})
    seen = torch.zeros([len(of_dim) - 1 for of_dim in numbers], dtype=torch.bool, device="cpu")
    for box in boxes:
        picked = [
            torch.arange(of_dim[start], of_dim[start + count], device="cpu")
            if step == 1
            else torch.tensor([of_dim[start + step * n] for n in range(count)], device="cpu")
            for of_dim, (start, step, count) in zip(numbers, box, strict=True)
        ]
        seen[torch.meshgrid(*picked, indexing="ij")] = True
    return bool(seen.all())


def _edges(start: int, step: int, count: int) -> set[int]:
    """Where indices begin and end, all of them if there are gaps."""
    if step == 1:
        return {start, start + count}
    return {edge for n in range(count) for edge in (start + step * n, start + step * n + 1)}


def _over_ranks(func: Callable[..., torch.Tensor], one: Slice) -> torch.Tensor:
    """``any`` or ``all`` over the parts of all ranks."""
    result = func(one.part()[0])
    number = result.to(torch.int32)
    for dim in range(one.root.mesh.ndim):
        op = dist.ReduceOp.MAX if func.name() == "aten::any" else dist.ReduceOp.MIN
        dist.all_reduce(number, op, group=one.root.mesh.get_group(dim))
    return number.to(result.dtype)


def _box(layout: torch.Tensor, shape: Sequence[int]) -> tuple[Box, list[int | None]] | None:
    """The box of a view of a contiguous tensor of *shape*, and for each of its dims that of the tensor."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    rest, starts = layout.storage_offset(), []
    for stride in strides:
        start, rest = divmod(rest, stride)
        starts.append(start)
    box, dims = [(start, 1, 1) for start in starts], []
    for count, step in zip(layout.shape, layout.stride(), strict=True):
        fits = (
            dim
            for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
            if dim not in dims and step and step % stride == 0 and starts[dim] + step // stride * (count - 1) < size
        )
        dim = None if count == 1 else next(fits, -1)
        if dim == -1:
            return None
        if dim is not None:
            box[dim] = (starts[dim], step // strides[dim], count)
        dims.append(dim)
    return tuple(box), dims


def _held(wanted: tuple[int, int, int], start: Start, held: int) -> tuple[slice, Start]:
    """Of *held* indices from *start* where those are that are *wanted*, and which of the wanted they are."""
    first, step, count = wanted
    indices = torch.arange(start, start + held, device="cpu") if isinstance(start, int) else start
    numbers = torch.div(indices - first, step, rounding_mode="floor")
    where = ((numbers * step + first == indices) & (numbers >= 0) & (numbers < count)).nonzero().flatten()
    if not len(where):
        return slice(0, 0), 0
    numbers = numbers[where]
    begin, stride = int(where[0]), int(where[1] - where[0]) if len(where) > 1 else 1
    return slice(begin, begin + stride * (len(where) - 1) + 1, stride), start_of(numbers)
