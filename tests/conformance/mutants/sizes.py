# SPDX-License-Identifier: Apache-2.0
"""Platforms that are right when small."""

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform, LoopbackWork, _value
from mutants.registry import mutant, namespace


def cut(platform, x, rows):
    """*x* with zeros from row *rows* on, differentiable."""
    if _value(x).ndim == 0 or len(_value(x)) <= rows:
        return x
    kept = (np.arange(len(_value(x))) < rows).reshape(-1, *(1,) * (_value(x).ndim - 1))
    return platform.xp.where(np.broadcast_to(kept, _value(x).shape), x, np.zeros_like(_value(x)))


def cut_in_backward(platform, x, rows):
    return platform.custom_vjp(lambda x: (x + 0, ()), lambda r, c, needed: (cut(platform, c[0], rows),))(x)


@mutant("PERM-large")
class IndexIn16Bits(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        return super().permute_rows(x, index.astype(np.uint16).astype(np.int64), inverse)


@mutant("PERM-large", says="gradient")
class InverseIn16Bits(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        return super().permute_rows(x, index, inverse.astype(np.uint16).astype(np.int64))


@mutant("SUM-rows-large")
class SumsInTilesOfThousand(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        return cut(self, super().sum_rows(x, index, inverse, weights), 1000)


@mutant("SUM-rows-large", says="gradient of the rows")
class GradientsOfSumsPast32768Rows(LoopbackPlatform):
    def sum_rows(self, x, index, inverse, weights=None):
        return super().sum_rows(cut_in_backward(self, x, 2**15), index, inverse, weights)


@mutant("SUM-rows-large", says="sums")
class SumsOfWideRows(LoopbackPlatform):
    """A block of threads has 256 columns."""

    def sum_rows(self, x, index, inverse, weights=None):
        out = super().sum_rows(x, index, inverse, weights)
        return out * (np.arange(x.shape[1]) < 256).astype(_value(out).dtype) if x.shape[1] > 256 else out


@mutant("GMM-large")
class GroupsPastATile(LoopbackPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        stops = np.cumsum(group_sizes)
        place = np.arange(len(_value(x))) - np.repeat(stops - group_sizes, group_sizes)
        out = super().grouped_matmul(x, weight, group_sizes)
        return out * (place < 256).astype(np.float32)[:, None] if len(_value(x)) > 256 else out


@mutant("GMM-large", says="gradient of the weight")
class WeightGradientsOfTheFirstRows(LoopbackPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        out = super().grouped_matmul(x, _value(weight), group_sizes)
        again = super().grouped_matmul(_value(x), weight, group_sizes)
        return out + cut_in_backward(self, again, 1024) - _value(again)


@mutant("GMM-large")
class MatricesPastATile(LoopbackPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        return super().grouped_matmul(x * (np.arange(x.shape[1]) < 256).astype(_value(x).dtype), weight, group_sizes)


@mutant("SWIGLU-large")
class ExpertsPastATile(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        return cut(self, super().grouped_swiglu(x, w1, w2, w3, group_sizes), 1024)


@mutant("SWIGLU-large", says="output of swiglu")
class ActivationsPast65536(LoopbackPlatform):
    def swiglu(self, gate, up):
        return cut(self, super().swiglu(gate, up), 2**16)


@mutant("A2A-large-messages", says="under way")
class LargeMessagesLostUnderWay(LoopbackPlatform):
    """What does not fit into a buffer of 100 kB is not there yet when it is waited for."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        out = super().all_to_all_single(x, output_splits, input_splits, group)
        if not async_op:
            return out
        return LoopbackWork(lambda: cut(self, out, max(1, 100_000 * len(out) // max(out.nbytes, 100_000))))


@mutant("A2A-large-messages", says="gradient")
class LargeMessagesLostInBackward(LoopbackPlatform):
    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        return super().differentiable_all_to_all_single(
            cut_in_backward(self, x, 1000), input_splits, output_splits, group
        )


def _cut_past(member, bytes):
    def changed(self, x, *args, **kwargs):
        out = getattr(LoopbackPlatform, member)(self, x, *args, **kwargs)
        return cut(self, out, 1000) if _value(x).nbytes > bytes else out

    return changed


for member in ("all_gather", "all_reduce", "reduce_scatter", "broadcast", "copy_to_group", "reduce_from_group"):
    name = "Large" + "".join(word.capitalize() for word in member.split("_"))
    mutant("COLLECTIVES-large")(type(name, (LoopbackPlatform,), {member: _cut_past(member, 100_000)}))


@mutant("HOST-large")
class CopiesToTheHostOfOnePage(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(
            x if x.nbytes <= 4096 else np.where(np.arange(x.size).reshape(x.shape) < 1024, x, np.zeros_like(x))
            for x in super().to_host(*tensors)
        )


@mutant("HOST-large", says="transposed")
class LargeArraysByMemory(LoopbackPlatform):
    """A fast path for what is large copies memory, and not values."""

    def from_host(self, array):
        if array.nbytes > 4096 and array.flags.f_contiguous and array.ndim > 1:
            return array.ravel(order="K").reshape(array.shape).copy()
        return super().from_host(array)


for function, change in (
    ("take", lambda x, i, *, axis=0: array_namespace.take(x, _value(i).astype(np.uint16).astype(np.int64), axis=axis)),
    (
        "argsort",
        lambda x, *, axis=-1, descending=False, stable=True: (
            array_namespace.argsort(x, axis=axis, descending=descending)
            if _value(x).size < 10_000
            else np.argsort(-_value(x) if descending else _value(x), axis=axis, kind="heapsort").astype(np.int64)
        ),
    ),
    ("sum", lambda x, **o: array_namespace.sum(x if _value(x).size < 2**16 else x[: 2**16], **o)),
):
    mutant("XP-large")(
        type(f"Large{function.capitalize()}", (LoopbackPlatform,), {"xp": namespace(**{function: change})})
    )


@mutant("MOD-large", says="assigned")
class AssignsAPage(LoopbackPlatform):
    def assign(self, parameter, value):
        before = parameter.value.reshape(-1)[1024:].copy()
        super().assign(parameter, value)
        parameter.value.reshape(-1)[1024:] = before


@mutant("DISPATCH-large")
class CountsIn16Bits(LoopbackPlatform):
    def to_host(self, *tensors):
        return tuple(
            a.astype(np.int16).astype(np.int64) if a.dtype == np.int64 and a.ndim == 2 else a
            for a in super().to_host(*tensors)
        )


# ------------------------------------------------------------------------------------------ wide, and many of them
@mutant("PERM-large", says="permuted rows")
class PermutedColumnsPast256(LoopbackPlatform):
    def permute_rows(self, x, index, inverse):
        out = super().permute_rows(x, index, inverse)
        wide = _value(x).ndim == 2 and x.shape[1] > 256
        return out * (np.arange(x.shape[1]) < 256).astype(_value(out).dtype) if wide else out


@mutant("SUM-rows-large", says="sums")
class SumsOfFourTerms(LoopbackPlatform):
    """A kernel that has a register for each of four."""

    def sum_rows(self, x, index, inverse, weights=None):
        if index.shape[1] <= 4 or _value(x).dtype.kind == "i":
            return super().sum_rows(x, index, inverse, weights)
        kept = np.broadcast_to(np.arange(index.shape[1]) < 4, index.shape).astype(_value(x).dtype)
        return super().sum_rows(x, index, inverse, kept if weights is None else weights * kept)


def _of_first_groups(out, sizes, groups=64):
    if len(sizes) <= groups:
        return out
    return out * (np.repeat(np.arange(len(sizes)), _value(sizes)) < groups)[:, None].astype(_value(out).dtype)


@mutant("GMM-large", says="output")
class ProductsOf64Groups(LoopbackPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        return _of_first_groups(super().grouped_matmul(x, weight, group_sizes), group_sizes)


@mutant("SWIGLU-large", says="output")
class ExpertsOf64Groups(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        return _of_first_groups(super().grouped_swiglu(x, w1, w2, w3, group_sizes), group_sizes)


@mutant("SWIGLU-large", says="output")
class HiddenColumnsPast64(LoopbackPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        kept = (np.arange(w2.shape[2]) < 64).astype(_value(w2).dtype)
        return super().grouped_swiglu(x, w1, w2 * kept if w2.shape[2] > 64 else w2, w3, group_sizes)
