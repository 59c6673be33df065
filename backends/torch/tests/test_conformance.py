# SPDX-License-Identifier: Apache-2.0
"""The conformance suite on gloo, with one process a rank; and that it finds faults put into this platform."""

import os
import signal
import time

import pytest
import torch
from hyperep_torch.launcher import TorchLauncher
from hyperep_torch.platform import TorchPlatform
from native_faults import NATIVE_FAULTS

from hyperep.conformance.suite import check_platform, check_target, find_target
from hyperep.conformance.target import Target
from hyperep.conformance.text import summary
from hyperep.conformance.verdict import Verdict


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_platform_conforms(ranks):
    report = check_platform("torch", (ranks,))
    assert report.conforms, summary(report, details=True)
    assert report.seconds < 170, "the suite must stay quick enough to be run often"


class FaultyLauncher(TorchLauncher):
    """Ranks whose platform gets a fault before anything runs."""

    def __init__(self, fault):
        self.fault = fault

    def host(self, process, function, platform_name):
        def faulty(platform):
            platform.__class__ = FAULTS[self.fault]
            return function(platform)

        return super().host(process, faulty, platform_name)


class Detached(TorchPlatform):
    """The exchange is right, and its result knows nothing of its input."""

    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        return self.all_to_all_single(x.detach(), output_splits, input_splits, group)


class ZeroRowsWithoutHistory(TorchPlatform):
    """A rank that receives nothing returns a new tensor: its peers wait for it in backward."""

    def differentiable_all_to_all_single(self, x, input_splits, output_splits, group=None):
        if sum(output_splits) == 0:
            self.all_to_all_single(x.detach(), output_splits, input_splits, group)
            return torch.zeros((0, *x.shape[1:]))
        return super().differentiable_all_to_all_single(x, input_splits, output_splits, group)


class ReducedInPlace(TorchPlatform):
    """The sum is written over the caller's tensor."""

    def all_reduce(self, x, group=None, op="sum"):
        out = super().all_reduce(x, group, op)
        with torch.no_grad():
            x.copy_(out)
        return x


class RankDies(TorchPlatform):
    """One rank is killed, as by the system when memory is short."""

    def all_gather(self, x, group=None):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().all_gather(x, group)


class RankHangs(TorchPlatform):
    """One rank never comes to the exchange."""

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        if self.rank == 1:
            time.sleep(600)
        return super().all_to_all_single(x, output_splits, input_splits, group, async_op)


def narrow_sum(x, index):
    """A running sum in the dtype of the rows, in which 256 + 1 is 256."""
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])[index.clamp(max=len(x))]  # [T, K, D]
    total = torch.zeros_like(rows[:, 0])
    for term in rows.unbind(1):
        total = total + term
    return total


class NarrowSums(TorchPlatform):
    """Rows of a token are added up in their own dtype."""

    def sum_rows(self, x, index, inverse, weights=None):
        return narrow_sum(x, index) if weights is None else super().sum_rows(x, index, inverse, weights)


class NarrowPartialSums(TorchPlatform):
    """The same, where some terms have no row, as for the sums that come back from the ranks."""

    def sum_rows(self, x, index, inverse, weights=None):
        if weights is None and len(x) < index.numel() and x.dtype == torch.bfloat16:
            return narrow_sum(x, index)
        return super().sum_rows(x, index, inverse, weights)


class ProductsThroughFloat16(TorchPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        if x.dtype != torch.bfloat16:
            return super().grouped_matmul(x, weight, group_sizes)
        return super().grouped_matmul(x.half(), weight.half(), group_sizes).bfloat16()


class ExpertsThroughBfloat16(TorchPlatform):
    def grouped_swiglu(self, x, w1, w2, w3, group_sizes):
        if x.dtype != torch.float16:
            return super().grouped_swiglu(x, w1, w2, w3, group_sizes)
        return super().grouped_swiglu(*(t.bfloat16() for t in (x, w1, w2, w3)), group_sizes).half()


class NoWeightGradientIn16Bits(TorchPlatform):
    def grouped_matmul(self, x, weight, group_sizes):
        return super().grouped_matmul(x, weight.detach() if x.element_size() == 2 else weight, group_sizes)


class NarrowWeights(TorchPlatform):
    """Weights are rounded to the dtype of the rows before they multiply."""

    def sum_rows(self, x, index, inverse, weights=None):
        return super().sum_rows(x, index, inverse, None if weights is None else weights.to(x.dtype))


_FAULTS = (Detached, ZeroRowsWithoutHistory, ReducedInPlace, RankDies, RankHangs)
_NARROW = (NarrowSums, NarrowPartialSums, NarrowWeights)
_OF_16_BITS = (ProductsThroughFloat16, ExpertsThroughBfloat16, NoWeightGradientIn16Bits)
FAULTS = {c.__name__: c for c in (*_FAULTS, *_NARROW, *_OF_16_BITS)} | NATIVE_FAULTS


@pytest.mark.parametrize(
    ("fault", "requirement", "says", "ranks"),
    [
        ("Detached", "A2A-grad", "gradient", 2),
        ("ZeroRowsWithoutHistory", "A2A-grad-zero-rows", "while others wait", 2),
        ("ReducedInPlace", "AR-new-tensor", "after all_reduce", 2),
        ("RankDies", "WORLD-ranks", "rank 1 of 2 died: killed by SIGKILL", 2),
        ("RankHangs", "A2A-even", "in all_to_all_single", 2),
        ("ProductsThroughFloat16", "GMM-bfloat16", "output of grouped_matmul: ", 1),
        ("ExpertsThroughBfloat16", "GMM-bfloat16", "grouped_swiglu in float16", 1),
        ("NoWeightGradientIn16Bits", "GMM-bfloat16", "gradient 2 of grouped_matmul", 1),
        ("NarrowSums", "SUM-rows-bfloat16", "the sum: 2 of 2 values differ", 1),
        ("NarrowPartialSums", "TOKENS-bfloat16", "must be 258", 4),
        ("NarrowWeights", "SUM-rows-bfloat16-weights", "must be 0.5", 1),
        ("RecordedForVjpAlone", "NATIVE-backward", "own gradient of input 0", 1),
        ("ParametersAreCopies", "NATIVE-backward", "gives parameter 0 no gradient", 1),
        ("BuffersNotSaved", "NATIVE-state", "saved are", 1),
        ("BuffersCountBackwards", "NATIVE-backward", "output, time 1", 1),
        ("WeightsReadWhenAssigned", "NATIVE-optimizer", "same values were assigned", 1),
        ("GradientsLeftBehind", "NATIVE-backward", "own gradient of parameter", 1),
    ],
)
def test_a_fault_is_found_by_the_requirement_that_names_it(fault, requirement, says, ranks):
    known = find_target("torch")
    faulty = Target(name="torch", launcher=FaultyLauncher(fault), declared=known.declared)
    began = time.monotonic()
    report = check_target(faulty, [ranks], only=[requirement], deadline=10)
    result = next(r for r in report.results if r.id == requirement)
    assert result.verdict is Verdict.FAILED, summary(report, details=True)
    assert says in result.message + result.detail
    assert time.monotonic() - began < 120
