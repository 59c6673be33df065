# SPDX-License-Identifier: Apache-2.0
"""What a failure says of each rank: a line with a place in the author's files, and the last call with its inputs."""

import ctypes
import inspect
import re
import time

import numpy as np

from hyperep.conformance.calls import told, watching_calls
from hyperep.conformance.suite import check_target
from hyperep.conformance.target import Target
from hyperep.conformance.verdict import Verdict
from hyperep.launch.doing import telling
from hyperep.loopback import LoopbackPlatform
from hyperep.loopback.launch import LoopbackLauncher, run
from hyperep.loopback.platform import CAPABILITIES
from hyperep.platform.validate import validate_platform


class Crashes(LoopbackPlatform):
    """Its all-gather reads memory that is not there."""

    def all_gather(self, x, group=None):
        if self.world_size > 1:
            ctypes.string_at(1)
        return super().all_gather(x, group)


class WrongOnOne(LoopbackPlatform):
    """One rank raises after the exchange, and no other one."""

    def all_gather(self, x, group=None):
        out = super().all_gather(x, group)
        if self.rank == 1:
            raise LookupError("no such rank\nand more")
        return out


class WrongValues(LoopbackPlatform):
    """Nothing is raised in the platform; what it returns is wrong."""

    def all_gather(self, x, group=None):
        return super().all_gather(x, group) + np.asarray(1, x.dtype)


class Hangs(LoopbackPlatform):
    """On one rank a sum without elements never arrives on the host."""

    def to_host(self, *tensors):
        if self.rank == 1 and tensors[0].shape == (4,) and not tensors[0].any():
            time.sleep(60)
        return super().to_host(*tensors)


class FaultyLauncher(LoopbackLauncher):
    """Loopback ranks of a faulty platform."""

    def __init__(self, name):
        self.name = name

    def host(self, process, function, platform_name):
        def faulty(platform):
            platform.__class__ = globals()[self.name]
            return function(platform)

        return run(faulty, len(process.ranks))


def found(platform, requirement="AG-values", deadline=30):
    declared = {c.value: s.value for c, s in CAPABILITIES.items()}
    target = Target(name="loopback", launcher=FaultyLauncher(platform.__name__), declared=declared)
    report = check_target(target, [2], only=[requirement], deadline=deadline)
    (result,) = (r for r in report.results if r.verdict is Verdict.FAILED)
    return result


def line_of(function):
    return inspect.unwrap(function).__code__.co_firstlineno


def test_a_platform_that_crashes_leaves_its_stack_and_the_inputs_of_the_call():
    result = found(Crashes)
    assert re.match(
        r"ranks 0, 1 of 2 died: crashed with SIGSEGV; it stood in string_at .* < all_gather \(test_calls",
        (result.message),
    )
    assert re.search(r"^  its last call: .*rank [01]: all_gather\(float32\[2\]\)", result.detail, flags=re.M)
    assert "Fatal Python error" in result.detail


def test_every_rank_has_a_line_with_a_place():
    result = found(WrongOnOne)
    assert result.message.startswith("on rank 1 only, while others wait for it: LookupError: no such rank")
    raised = line_of(WrongOnOne.all_gather) + 3
    lines = result.detail.splitlines()
    assert f"rank 1: failed: LookupError: no such rank: in all_gather (test_calls.py:{raised})" in lines
    (other,) = (line for line in lines if line.startswith("rank 0: "))
    assert "finished" not in other
    assert re.match(r"rank 0: still running: in .*\(\w+\.py:\d+\)", other)


def test_a_rank_that_does_not_come_back_leaves_its_place_its_call_and_what_the_check_was_about():
    result = found(Hangs, "XP-sum", deadline=3)
    stood = line_of(Hangs.to_host) + 2
    assert result.message == (
        "not done within the deadline of 3 s: rank 1 still runs, last call to_host(float32[4]), "
        f"in to_host (test_calls.py:{stood})"
    )
    assert "  inputs: ['float32[0, 4]']" in result.detail.splitlines()


def test_wrong_values_are_followed_to_the_member_that_was_called_last():
    result = found(WrongValues)
    place = f"in all_gather (test_calls.py:{line_of(WrongValues.all_gather)})"
    lines = [line for line in result.detail.splitlines() if line.startswith("rank ")]
    assert len(lines) == 2
    assert all(line.startswith("rank ") and ": failed: " in line and line.endswith(place) for line in lines)
    assert "  its last call: all_gather(float32[2])" in result.detail.splitlines()


def test_a_call_is_told_before_it_is_made_and_in_one_line():
    class Platform(LoopbackPlatform):
        def broadcast(self, x, source=0, group=None):
            assert heard[-1] == "broadcast(float64[2, 3], source=0)"
            return super().broadcast(x, source, group)

        def all_gather(self, x):
            return super().all_gather(x)

    platform, heard = Platform(), []
    x = np.ones((2, 3))
    with telling(heard.append), watching_calls(platform) as last:
        platform.broadcast(x, source=0)
        platform.barrier()
        assert heard[-1].startswith("to_host("), "what a default calls is told too"
        assert "barrier()" in heard
        assert last.text.startswith("all_reduce(int32[1]"), "what looks at a result is not what made it"
        platform.all_to_all_single(x, [2], [2])
        assert heard[-1] == "all_to_all_single(float64[2, 3], [2], [2])"
        (fault,) = validate_platform(platform)
        assert fault.member == "all_gather", "signatures stay what they are"
    assert not {"broadcast", "all_to_all_single"} & set(vars(platform))
    count = len(heard)
    platform.all_gather(x)
    assert len(heard) == count


def test_inputs_of_any_kind_are_one_short_line():
    def is_tensor(value):
        if isinstance(value, np.ndarray):
            return True
        raise RuntimeError("under test")

    text = told("f", (np.ones(2, np.float32), list(range(99)), object(), None), {"op": "sum"}, is_tensor)
    assert text.startswith("f(float32[2], list, object, NoneType, op=str)")
    text = told("f", (list(range(99)), {"a": 1}), {"x": None}, LoopbackPlatform().is_tensor)
    assert text == f"f([{', '.join(map(str, range(16)))}, ...], <dict>, x=None)"


def test_a_platform_that_takes_no_attributes_is_judged_all_the_same():
    class Sealed:
        __slots__ = ()

        def is_tensor(self, value):
            return False

    with watching_calls(Sealed()) as last:
        assert last.text == ""
