# SPDX-License-Identifier: Apache-2.0
"""Speed is measured as a ratio, told to the author, and no part of the verdict."""

import numpy as np
import pytest

from hyperep.conformance import speed
from hyperep.conformance.case import Case
from hyperep.conformance.catalogue import requirements
from hyperep.conformance.matrix import as_markdown, cell
from hyperep.conformance.report import Report, badness
from hyperep.conformance.requirement import Level
from hyperep.conformance.requirements.speed import products
from hyperep.conformance.suite import check_target
from hyperep.conformance.target import Target
from hyperep.conformance.text import summary
from hyperep.conformance.verdict import Verdict, judge
from hyperep.loopback import LoopbackPlatform
from hyperep.loopback.launch import LoopbackLauncher, run
from hyperep.loopback.platform import CAPABILITIES

SPEED = [r.id for r in requirements().values() if r.level is Level.SPEED]


def test_a_ratio_is_that_of_the_best_rounds_and_counts_no_warm_up():
    now, order = [0.0], []
    seconds = {"what": iter([99, 9, 6, 8, 7, 9]), "own": iter([50, 4, 2, 3, 5, 4])}

    def call(name):
        order.append(name)
        now[0] += next(seconds[name])
        return [name]

    def finish(tensors):
        now[0] += 1.0  # the result is there a second later

    found = speed.ratio(lambda: call("what"), lambda: call("own"), finish, lambda: now[0])
    assert found == (6 + 1) / (2 + 1)
    assert order == ["what", "own"] * 6


@pytest.mark.parametrize(
    ("ratio", "own", "text"),
    [
        (2.04, (), "2.0 times that; swiglu and grouped_matmul are of PlatformBase, override them"),
        (2.04, ("swiglu",), "2.0 times that; grouped_matmul is of PlatformBase, override it"),
        (1.94, (), "1.9 times that"),
        (9.0, ("swiglu", "grouped_matmul"), "9.0 times that"),
    ],
)
def test_a_slow_default_is_named(monkeypatch, ratio, own, text):
    monkeypatch.setattr(speed, "ratio", lambda *arguments: ratio)
    kind = type("Mine", (LoopbackPlatform,), {name: lambda self: None for name in own})
    case = Case(platform=kind(), requirement="SPEED-products", seed=0, ranks=1, declared={})
    speed.compare_speed(case, tuple, tuple, "that", ("swiglu", "grouped_matmul"))
    assert case.measurements == [(ratio, text)]


def test_the_slowest_rank_is_told():
    outcomes = [{"outcome": "met", "ratio": r, "message": f"{r} times"} for r in (1.0, 7.5, 2.0)]
    supports = dict.fromkeys(("grouped_matmul", "autodiff"), "full")
    found = judge(products, outcomes, supports)
    assert (found.verdict, found.message, found.ratio) == (Verdict.MEASURED, "7.5 times", 7.5)


class Lame(LoopbackPlatform):
    """Right for small groups, as far as the other requirements look; and it fails where there are many."""

    def grouped_matmul(self, x, weight, group_sizes):
        if weight.shape[0] == 32:
            raise MemoryError("32 groups")
        return super().grouped_matmul(x, weight, group_sizes)


class LameLauncher(LoopbackLauncher):
    def host(self, process, function, platform_name):
        def lame(platform):
            platform.__class__ = Lame
            return function(platform)

        return run(lame, len(process.ranks))


def test_a_measurement_decides_nothing():
    declared = {c.value: s.value for c, s in CAPABILITIES.items()}
    report = check_target(
        Target(name="loopback", launcher=LameLauncher(), declared=declared), [2], only=["SPEED", "GMM-grad"]
    )
    found = {r.id: r for r in report.results if r.id in SPEED}
    assert report.passed, summary(report)
    assert found["SPEED-products"].verdict is Verdict.UNMEASURED
    assert found["SPEED-products"].ratio is None
    assert found["SPEED-rows"].verdict is Verdict.MEASURED
    assert found["SPEED-rows"].ratio > 0
    text = summary(report)
    assert "SPEED-products (world size 2): not measured: MemoryError: 32 groups" in text
    assert f"SPEED-rows (world size 2): {found['SPEED-rows'].message}" in text
    assert Report.from_json(report.to_json()) == report
    assert cell(report, "SPEED-rows")[0] is Verdict.MEASURED
    assert f"| `SPEED-rows` | {found['SPEED-rows'].ratio:.1f} x |" in as_markdown([report])
    assert "| `SPEED-products` | ? |" in as_markdown([report])
    slower = type(found["SPEED-rows"])(**{**vars(found["SPEED-rows"]), "ratio": 99.0})
    assert badness(found["SPEED-products"]) < badness(slower) < badness(found["SPEED-rows"])


def test_what_is_measured_is_right(monkeypatch):
    """The calls that are timed do what they are said to: the same sizes on both sides, gradients of all inputs."""
    seen = {}

    def measure(case, what, own, words, members):
        seen[case.requirement] = [t.shape for t in what()], [t.shape for t in own()], words, members
        case.measured(1.0, "x")

    monkeypatch.setattr("hyperep.conformance.requirements.speed.compare_speed", measure)

    def on_rank(platform):
        for id in SPEED:
            if platform.world_size >= requirements()[id].min_ranks:
                requirements()[id].check(
                    Case(platform=platform, requirement=id, seed=0, ranks=platform.world_size, declared={})
                )

    run(on_rank, 3)
    assert set(seen) == set(SPEED)
    (grad,), gathered, *_ = seen["SPEED-exchange"]
    assert abs(grad[0] - gathered[0][0]) <= 3
    assert len(gathered) == 2
    rows, passes, *_ = seen["SPEED-rows"]
    assert rows == passes[:1]
    assert len(passes) == 4
    grads, dense, *_ = seen["SPEED-products"]
    assert grads[0] == dense[0] == dense[1]
    assert grads[1] == (32, *dense[2])
    assert np.prod(dense[2]) == 128 * 128
