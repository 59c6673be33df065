# SPDX-License-Identifier: Apache-2.0
"""The ``Platform`` protocol: everything that the core asks of a framework.

A platform is an object that is passed in. It is bound to one rank and one device; several may live in one process.
The protocol is structural: nothing has to be inherited. Authors who want defaults for the members that can be built
from others inherit :class:`hyperep.platform.base.PlatformBase`.

Letters used for shapes here and in the core:

====== ==========================================
``R``  ranks in a group
``E``  experts in all; ``L`` experts of one rank
``N``  rows (tokens, after routing)
``D``  model dimension; ``H`` hidden dimension
====== ==========================================

Rules that hold for every member:

* Splits count **rows** of dimension 0, whatever the other dimensions are.
* Whether an input of a collective wants a gradient is the same on all ranks of the group. A cotangent that is zero on
  some of them is exchanged as any other.
* Zero rows are legal everywhere. A collective with zero rows is still issued, its result still carries gradient, and
  the gradient of a weight that met no row is zero, never absent.
* Inputs and cotangents may be non-contiguous. Counts are int32 or int64; row indices are int64, also when empty.
* Groups are created, and collectives are issued, in the same order on all ranks. Each group has an order of its own,
  also of two groups of the same ranks: where ``THREADS`` is declared, the orders of two groups are independent.
* Results of collectives are new tensors, in a group of one rank too. No member writes to what it is given, keeps it
  beyond the call or the graph, or uses the memory of a result again that somebody has.
* Arithmetic is done in the dtype of its operands at least: nothing passes through a narrower one.
* ``group=None`` is the world.
* What a platform cannot do raises :class:`~hyperep.platform.errors.UnsupportedCapability`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

    from hyperep.mesh import DeviceMesh
    from hyperep.platform.capabilities import Capability, Support
    from hyperep.sharding import Sharding

__all__ = ["Backward", "Forward", "Group", "Module", "Parameter", "Platform", "Work"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Group = Any
"""An opaque handle of a process group; only the platform that made it looks inside."""
Module = Any
"""A framework's native module (``nn.Module``, ``nn.Cell``, ...)."""
Parameter = Any
"""A framework's native parameter, as its optimizers know it; read with ``local``, written with ``assign``."""

Forward = Callable[..., tuple[Any, tuple[Any, ...]]]
"""``forward(*inputs) -> (outputs, residuals)``: one tensor or a tuple of them, and the tensors kept for backward."""
Backward = Callable[[tuple[Any, ...], tuple[Any, ...], tuple[bool, ...]], tuple[Any, ...]]
"""``backward(residuals, cotangents, needed) -> gradients``: one entry per input, ``None`` where ``needed`` is false."""


@runtime_checkable
class Work(Protocol[T_co]):
    """A collective under way."""

    def wait(self) -> T_co:
        """Return the result once this rank may use it. Idempotent; before the first call contents are undefined."""
        ...


@runtime_checkable
class Platform(Protocol[T]):
    """One framework, on one device, as one rank of a world. See the module's docstring for the common rules."""

    # ---------------------------------------------------------------------------------------------- identity
    @property
    def name(self) -> str:
        """The name under which the platform is registered, ``"torch"`` for example."""
        ...

    @property
    def device(self) -> str:
        """The device that tensors live on, for people to read: ``"cpu"``, ``"cuda:0"``."""
        ...

    @property
    def capabilities(self) -> Mapping[Capability, Support]:
        """What this platform can do on this device. An absent key means ``UNSUPPORTED``."""
        ...

    # ------------------------------------------------------------------------------------------------- world
    @property
    def rank(self) -> int:
        """This process's (or thread's) rank in the world, ``0 <= rank < world_size``."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks in the world; 1 when nothing was launched."""
        ...

    def new_group(self, ranks: Sequence[int]) -> Group:
        """Make a group of the given world ranks.

        Collective over the whole world: every rank calls it, members or not, in the same order. Ranks outside the
        group get a handle that must not be used.
        """
        ...

    def barrier(self, group: Group = None) -> None:
        """Return once every rank of the group has called it."""
        ...

    # ------------------------------------------------------------------------------------------------ arrays
    @property
    def xp(self) -> Any:
        """Array namespace with at least the names of :mod:`hyperep.platform.array_subset`, differentiable."""
        ...

    def is_tensor(self, value: object) -> bool:
        """Whether *value* is a tensor that the other members take: of this framework, dense, and on this device."""
        ...

    def arange(self, start: int, stop: int | None = None, step: int = 1, *, dtype: Any = None) -> T:
        """Evenly spaced integers on the device; int64 unless *dtype* says otherwise."""
        ...

    def from_host(self, array: np.ndarray) -> T:
        """Copy a NumPy array to the device, keeping its dtype. The array may be changed afterwards."""
        ...

    def to_host(self, *tensors: T) -> tuple[np.ndarray, ...]:
        """Copy tensors to the host in ONE batched transfer: the only member that may block the host on the device.

        The results are detached from autodiff and own their memory. bfloat16 arrives as float32.
        """
        ...

    def stop_gradient(self, x: T) -> T:
        """The same values, through which no gradient flows."""
        ...

    # -------------------------------------------------------------------------------------------------- rows
    def permute_rows(self, x: T, index: T, inverse: T) -> T:
        """``x[index]`` for a permutation of the rows; ``index`` and ``inverse`` are int64 ``[N]``.

        Differentiable in *x*: the backward is the gather by *inverse*, with no scatter and no atomics.
        """
        ...

    def sum_rows(self, x: T, index: T, inverse: T, weights: T | None = None) -> T:
        """Sum up to ``K`` rows into each result: ``out[t] = sum over k of weights[t, k] * x[index[t, k]]``.

        ``x`` is ``[N, D]``; ``index``, int64 ``[T, K]``, names each row exactly once, and ``inverse``, int64 ``[N]``,
        is where: row ``i`` is entry ``inverse[i]`` of the flattened index. The entries that are left, if ``N < T * K``,
        are ``N`` or more: a term without a row, which adds nothing, whatever its weight, and gives its weight the
        gradient zero. ``weights`` are ``[T, K]``, or left out for ones. The result ``[T, D]`` has the dtype of *x*;
        sums are taken in float32 at least. Differentiable in *x* and *weights*, with no scatter and no atomics.
        """
        ...

    def grouped_matmul(self, x: T, weight: T, group_sizes: T) -> T:
        """Multiply runs of rows by the transpose of their own matrix: ``[N, D] x [L, H, D] -> [N, H]``.

        Rows are sorted by group; ``group_sizes`` is an integer tensor ``[L]`` whose sum is ``N``. Differentiable in
        *x* and *weight*. A group without rows contributes nothing and gets a zero weight gradient.
        """
        ...

    def swiglu(self, gate: T, up: T) -> T:
        """``silu(gate) * up``, elementwise (arXiv:2002.05202); keeps the two inputs for backward and nothing else."""
        ...

    def grouped_swiglu(self, x: T, w1: T, w2: T, w3: T, group_sizes: T) -> T:
        """The feed-forward network of each group on its own run of rows: ``(silu(x w1^T) * (x w3^T)) w2^T``.

        ``x`` is ``[N, D]``, ``w1`` and ``w3`` are ``[L, H, D]``, ``w2`` is ``[L, D, H]``; the result is ``[N, D]``.
        Rows, sizes, groups without rows and zero rows are as for :meth:`grouped_matmul`. Differentiable in *x* and in
        all three weights. It equals three grouped products with the activation between them; it is one member so that
        a platform can keep less for backward (the rows and the two hidden projections suffice) and fuse more.
        """
        ...

    # ------------------------------------------------------------------------------------------- collectives
    def all_to_all_single(
        self,
        x: T,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        group: Group = None,
        async_op: bool = False,
    ) -> T | Work[T]:
        """Send ``input_splits[r]`` rows to each rank ``r`` and receive ``output_splits[r]`` from it, in rank order.

        ``None`` splits evenly. Never recorded by autodiff: counts must not cause a collective in backward. Splits that
        two ranks disagree about are an error on one of them at least.
        """
        ...

    def differentiable_all_to_all_single(
        self, x: T, input_splits: Sequence[int], output_splits: Sequence[int], group: Group = None
    ) -> T:
        """All-to-all of rows whose backward is the all-to-all of the cotangent with the splits exchanged."""
        ...

    def all_gather(self, x: T, group: Group = None) -> T:
        """Concatenate the equally shaped tensors of all ranks along dimension 0, in rank order. Not recorded."""
        ...

    def reduce_scatter(self, x: T, group: Group = None) -> T:
        """Sum over ranks; each keeps its own equal part of the rows of dimension 0. Not recorded."""
        ...

    def all_reduce(self, x: T, group: Group = None, op: str = "sum") -> T:
        """Reduce over ranks with ``"sum"``, ``"max"`` or ``"min"``; returns a new tensor. Not recorded."""
        ...

    def broadcast(self, x: T, source: int = 0, group: Group = None) -> T:
        """The tensor of the group's rank *source* (a rank in the group); returns a new tensor. Not recorded."""
        ...

    def copy_to_group(self, x: T, group: Group = None) -> T:
        """Identity forward, all-reduce of the cotangent backward (Megatron-LM's *f*; arXiv:1909.08053)."""
        ...

    def reduce_from_group(self, x: T, group: Group = None) -> T:
        """All-reduce forward, identity backward (Megatron-LM's *g*; arXiv:1909.08053)."""
        ...

    # ----------------------------------------------------------------------------------------------- modules
    def make_module(
        self,
        name: str,
        parameters: Mapping[str, T],
        forward: Callable[..., Any],
        *,
        children: Mapping[str, Module] | None = None,
        buffers: Mapping[str, T] | None = None,
        description: str = "",
    ) -> Module:
        """Make a native module around a neutral *forward*.

        Calling the module calls ``forward(m, *inputs, **kwargs)``, where ``m`` has an attribute for each parameter
        and buffer (the **local** tensor, through which gradients flow) and for each child (callable). *name* and
        *description* are what the module prints. Parameters are trainable and known to the framework's optimizers;
        buffers are saved with the module, get no gradient, and keep their dtype whatever the module is cast to.
        """
        ...

    def named_modules(self, module: Module) -> dict[str, Module]:
        """The module itself under ``""``, and every module below it by dotted path.

        In the order in which they were made, as :meth:`parameters` and :meth:`buffers`: own ones first, then those of
        each child. It is the same on every rank, where optimizers go by it.
        """
        ...

    def parameters(self, module: Module) -> dict[str, Parameter]:
        """Every trainable parameter of the module and those below it, by dotted path.

        A parameter is one object, the same at each call, which can be weakly referenced.
        """
        ...

    def buffers(self, module: Module) -> dict[str, Parameter]:
        """Every buffer of the module and those below it, by dotted path; objects as those of :meth:`parameters`."""
        ...

    def local(self, parameter: Parameter) -> T:
        """The part of a parameter or buffer that this rank holds (all of it, unless it is sharded).

        Of what :meth:`from_local` made too, as :meth:`sharding`. Gradients flow through it.
        """
        ...

    def sharding(self, parameter: Parameter) -> Sharding | None:
        """How a parameter is laid out over a mesh; ``None`` if it never was distributed."""
        ...

    def assign(self, parameter: Parameter, value: T) -> None:
        """Overwrite this rank's part of a parameter or buffer in place, outside autodiff.

        It keeps its dtype, and takes a copy; a value of another shape is an error.
        """
        ...

    def shard_parameter(self, module: Module, name: str, local: T, sharding: Sharding) -> None:
        """Replace the direct parameter or buffer *name* of *module* by its shard *local*, laid out as *sharding* says.

        It keeps what the framework's users have set on it, as far as that makes sense for a shard: whether it wants
        gradients, and attributes. Two modules that hold one parameter hold one shard when both were asked for the same.
        One that lies so already stays: *local* is its own part then.
        """
        ...

    def from_local(self, local: T, sharding: Sharding) -> Any:
        """The framework's distributed tensor made of every rank's *local* part."""
        ...

    def wrap_forward(self, module: Module, wrapper: Callable[..., Any]) -> None:
        """From now on calling *module* calls ``wrapper(inner, *inputs, **kwargs)``, where ``inner`` is what it did.

        Wrappers nest, the last one outermost. What passes between the parts before and after ``inner`` are the
        wrapper's local variables: nothing is kept on the module.
        """
        ...

    def functional_call(
        self, module: Module, parameters: Mapping[str, T], function: Callable[..., Any], *inputs: Any, **kwargs: Any
    ) -> Any:
        """Call ``function(*inputs, **kwargs)``, in which *module* has *parameters* in place of its own local ones.

        *parameters* are by dotted path, of any shape, and gradients flow through them; those that are left out stay as
        they are. *function* is what calls the module: the ``inner`` of a wrapper, for instance.
        """
        ...

    def adopt_mesh(self, mesh: object) -> DeviceMesh | None:
        """The core's view of a native mesh of this framework; ``None`` if *mesh* is not one."""
        ...

    # ---------------------------------------------------------------------------------------------- autodiff
    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:
        """A differentiable function made of a forward and a hand-written backward (as ``jax.custom_vjp``).

        The returned function takes tensors only and may be called any number of times; whatever else the two
        functions need, they close over. Nothing inside *forward* is recorded. Cotangents of outputs that were not
        used arrive as zeros. Residuals live as long as the graph does.
        """
        ...

    def vjp(
        self, function: Callable[..., Any], *primals: T, parameters: Sequence[Parameter] = ()
    ) -> tuple[Any, Callable[..., tuple[T, ...]]]:
        """Evaluate ``function(*primals)`` and return its outputs and its pullback.

        ``pullback(*cotangents)`` takes one cotangent per output and returns the gradients of the primals, then of
        the local parts of *parameters* (which *function* reaches through modules). Gradients are never absent: what
        does not influence the output gets zeros. The pullback may be called once. Parameters that were not asked for
        are constants; a tensor given twice counts as two primals.

        A function that is being differentiated may call ``vjp``. So may a custom forward, also on parameters that an
        enclosing ``vjp`` differentiates, with a backward that calls the pullbacks, the last one first; and so may a
        custom backward. To the inner one every tensor of the outer one is a constant, and what it returns, outputs and
        gradients, are constants to the outer one: there are no second derivatives.
        """
        ...
