# SPDX-License-Identifier: Apache-2.0
"""``PlatformBase``: what authors may inherit. Its members are abstract, or have a default built on other members.

An author begins with the abstract ones, and overrides a default where the framework has a faster operator. The
defaults are differentiable through ``custom_vjp`` alone, so that one right ``custom_vjp`` and right plain collectives
make every gradient of expert parallelism right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import UnsupportedCapability
from hyperep.platform.protocol import Backward, Forward, Group, Module, Parameter, Work
from hyperep.platform.sum_rows import sum_rows, widened
from hyperep.platform.swiglu import swiglu

if TYPE_CHECKING:
    from hyperep.mesh import DeviceMesh
    from hyperep.sharding import Sharding

__all__ = ["PlatformBase"]

T = TypeVar("T")


class PlatformBase(ABC, Generic[T]):
    """Base class for platforms; the meaning of each member is in :class:`hyperep.platform.protocol.Platform`."""

    # ------------------------------------------------------------------------------------- to be written
    @property
    @abstractmethod
    def name(self) -> str: ...  # noqa: D102

    @property
    @abstractmethod
    def device(self) -> str: ...  # noqa: D102

    @property
    @abstractmethod
    def capabilities(self) -> Mapping[Capability, Support]: ...  # noqa: D102

    @property
    @abstractmethod
    def rank(self) -> int: ...  # noqa: D102

    @property
    @abstractmethod
    def world_size(self) -> int: ...  # noqa: D102

    @abstractmethod
    def new_group(self, ranks: Sequence[int]) -> Group: ...  # noqa: D102

    @property
    @abstractmethod
    def xp(self) -> Any: ...  # noqa: D102

    @abstractmethod
    def is_tensor(self, value: object) -> bool: ...  # noqa: D102

    @abstractmethod
    def from_host(self, array: np.ndarray) -> T: ...  # noqa: D102

    @abstractmethod
    def to_host(self, *tensors: T) -> tuple[np.ndarray, ...]: ...  # noqa: D102

    @abstractmethod
    def all_to_all_single(  # noqa: D102
        self,
        x: T,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group = None,
        async_op: bool = False,
    ) -> T | Work[T]: ...

    @abstractmethod
    def all_gather(self, x: T, group: Group = None) -> T: ...  # noqa: D102

    @abstractmethod
    def all_reduce(self, x: T, group: Group = None, op: str = "sum") -> T: ...  # noqa: D102

    @abstractmethod
    def broadcast(self, x: T, source: int = 0, group: Group = None) -> T: ...  # noqa: D102

    @abstractmethod
    def group_size(self, group: Group = None) -> int:
        """Number of ranks in a group; what the defaults below need to know of a handle."""

    @abstractmethod
    def make_module(  # noqa: D102
        self,
        name: str,
        parameters: Mapping[str, T],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, Module] | None = None,
        buffers: Mapping[str, T] | None = None,
        description: str = "",
    ) -> Module: ...

    @abstractmethod
    def named_modules(self, module: Module) -> dict[str, Module]: ...  # noqa: D102

    @abstractmethod
    def parameters(self, module: Module) -> dict[str, Parameter]: ...  # noqa: D102

    @abstractmethod
    def buffers(self, module: Module) -> dict[str, Parameter]: ...  # noqa: D102

    @abstractmethod
    def local(self, parameter: Parameter) -> T: ...  # noqa: D102

    @abstractmethod
    def sharding(self, parameter: Parameter) -> Sharding | None: ...  # noqa: D102

    @abstractmethod
    def assign(self, parameter: Parameter, value: T) -> None: ...  # noqa: D102

    @abstractmethod
    def shard_parameter(self, module: Module, name: str, local: T, sharding: Sharding) -> None: ...  # noqa: D102

    @abstractmethod
    def wrap_forward(self, module: Module, wrapper: Callable[..., Any]) -> None: ...  # noqa: D102

    @abstractmethod
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]: ...  # noqa: D102

    @abstractmethod
    def vjp(  # noqa: D102
        self, function: Callable[..., Any], *primals: T, parameters: Sequence[Parameter] = ()
    ) -> tuple[Any, Callable[..., tuple[T, ...]]]: ...

    # ------------------------------------------------------------------------- built on the members above
    # On members of the protocol and on group_size, and on nothing else of this class: platforms that inherit nothing
    # are given those that came to the protocol after they were written (hyperep.platform.completion).
    def arange(self, start: int, stop: int | None = None, step: int = 1, *, dtype: Any = None) -> T:  # noqa: D102
        return self.xp.arange(start, stop, step, dtype=self.xp.int64 if dtype is None else dtype)

    def barrier(self, group: Group = None) -> None:  # noqa: D102
        # Only the copy to the host proves that the collective has happened, and not merely been enqueued.
        self.to_host(self.all_reduce(self.xp.zeros((1,), dtype=self.xp.int32), group))

    def stop_gradient(self, x: T) -> T:  # noqa: D102
        # Zeros where a gradient is needed, as for every backward: some tapes crash on one that is absent.
        return self.custom_vjp(
            lambda x: (_copied(self.xp, x), ()),
            lambda residuals, cotangents, needed: (self.xp.zeros_like(cotangents[0]) if needed[0] else None,),
        )(x)

    def from_local(self, local: T, sharding: Sharding) -> Any:  # noqa: D102
        from hyperep.sharding import ShardedTensor

        return ShardedTensor(local, sharding)

    def functional_call(  # noqa: D102
        self, module: Module, parameters: Mapping[str, T], function: Callable[..., Any], *inputs: Any, **kwargs: Any
    ) -> Any:
        raise UnsupportedCapability(
            self.name, Capability.FUNCTIONAL_CALL, "its modules cannot be called with other tensors as parameters"
        )

    def adopt_mesh(self, mesh: object) -> DeviceMesh | None:  # noqa: D102
        return None

    def reduce_scatter(self, x: T, group: Group = None) -> T:  # noqa: D102
        ranks = self.group_size(group)
        rows, *rest = x.shape  # type: ignore[attr-defined]
        terms = self.all_to_all_single(x, group=group)  # [R * N/R, ...]: rank r's term for this rank's rows
        total = self.xp.sum(widened(self.xp, self.xp.reshape(terms, (ranks, rows // ranks, *rest))), axis=0)
        return self.xp.astype(total, x.dtype)  # type: ignore[attr-defined]  # the standard's sum of int32 is int64

    def permute_rows(self, x: T, index: T, inverse: T) -> T:  # noqa: D102
        def forward(x: T) -> tuple[T, tuple[T, ...]]:
            return self.xp.take(x, index, axis=0), ()

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[T, ...]:
            return (self.xp.take(cotangents[0], inverse, axis=0),)

        return self.custom_vjp(forward, backward)(x)

    def sum_rows(self, x: T, index: T, inverse: T, weights: T | None = None) -> T:  # noqa: D102
        return sum_rows(self, x, index, inverse, weights)

    def grouped_matmul(self, x: T, weight: T, group_sizes: T) -> T:
        """A loop over the groups that reads ``group_sizes`` on the host; see the protocol.

        Differentiating ``weight[e]`` in a loop would make a full-size zero gradient for every group. Here the loop is
        inside a custom backward, which stacks one product per group instead.

        Raises:
            ValueError: the sizes do not sum to the rows.
        """
        sizes = self.to_host(group_sizes)[0]
        stops = np.cumsum(sizes).tolist()
        if stops[-1:] != [x.shape[0]]:  # type: ignore[attr-defined]
            raise ValueError(f"group_sizes={sizes.tolist()} must sum to the {x.shape[0]} rows")  # type: ignore[attr-defined]
        runs = list(zip([0, *stops[:-1]], stops, strict=True))
        xp = self.xp

        def forward(x: T, weight: T) -> tuple[T, tuple[T, ...]]:
            # The namespace's product, because the operators of some tensors leave the sum of no terms unwritten.
            products = [xp.matmul(x[a:b], xp.permute_dims(weight[e], (1, 0))) for e, (a, b) in enumerate(runs)]  # type: ignore[index]
            return xp.concat(products, axis=0), (x, weight)

        def backward(residuals: Any, cotangents: Any, needed: tuple[bool, ...]) -> tuple[T | None, ...]:
            (x, weight), (g,) = residuals, cotangents
            grad_x = grad_w = None
            if needed[0]:
                grad_x = xp.concat([xp.matmul(g[a:b], weight[e]) for e, (a, b) in enumerate(runs)], axis=0)
            if needed[1]:
                grad_w = xp.stack([xp.matmul(xp.permute_dims(g[a:b], (1, 0)), x[a:b]) for a, b in runs], axis=0)
            return grad_x, grad_w

        return self.custom_vjp(forward, backward)(x, weight)

    def swiglu(self, gate: T, up: T) -> T:  # noqa: D102
        return swiglu(self, gate, up)

    def grouped_swiglu(self, x: T, w1: T, w2: T, w3: T, group_sizes: T) -> T:
        """Three grouped products; see the protocol. Keeps the rows, the two projections and the hidden rows."""
        gate = self.grouped_matmul(x, w1, group_sizes)  # [N, H]
        up = self.grouped_matmul(x, w3, group_sizes)  # [N, H]
        return self.grouped_matmul(self.swiglu(gate, up), w2, group_sizes)  # [N, D]

    def differentiable_all_to_all_single(  # noqa: D102
        self, x: T, input_splits: Sequence[int], output_splits: Sequence[int], group: Group = None
    ) -> T:
        def forward(x: T) -> tuple[Any, tuple[T, ...]]:
            return self.all_to_all_single(x, output_splits, input_splits, group), ()

        def backward(residuals: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
            return (self.all_to_all_single(cotangents[0], input_splits, output_splits, group),)

        return self.custom_vjp(forward, backward)(x)

    def copy_to_group(self, x: T, group: Group = None) -> T:  # noqa: D102
        return self.custom_vjp(
            lambda x: (_copied(self.xp, x), ()),
            lambda residuals, cotangents, needed: (self.all_reduce(cotangents[0], group),),
        )(x)

    def reduce_from_group(self, x: T, group: Group = None) -> T:  # noqa: D102
        return self.custom_vjp(
            lambda x: (self.all_reduce(x, group), ()),
            lambda residuals, cotangents, needed: (cotangents[0],),
        )(x)


def _copied(xp: Any, x: Any) -> Any:
    """The same values, bit for bit, of any dtype: adding zero would make integers of booleans, and 0.0 of -0.0."""
    return xp.astype(x, x.dtype)
