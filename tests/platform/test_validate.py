# SPDX-License-Identifier: Apache-2.0
"""``validate_platform`` lists every fault of an implementation, and finds none in a right one."""

import inspect
import pickle
from types import SimpleNamespace

import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.platform.array_subset import ARRAY_FUNCTIONS
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import PlatformError
from hyperep.platform.protocol import Platform
from hyperep.platform.validate import Fault, check_platform, validate_platform

MEMBERS = sorted(name for name in vars(Platform) if not name.startswith("_"))


def broken(**members):
    """The loopback platform with some members replaced."""
    return type("Broken", (LoopbackPlatform,), members)()


def faults(platform):
    """The faults as text by member."""
    found = {}
    for fault in validate_platform(platform):
        found.setdefault(fault.member, []).append(fault.rule)
    return found


def test_loopback_has_no_fault():
    assert validate_platform(LoopbackPlatform()) == []
    check_platform(LoopbackPlatform())


def test_an_empty_object_lacks_every_member():
    assert sorted(faults(SimpleNamespace())) == MEMBERS


@pytest.mark.parametrize("member", MEMBERS)
def test_each_member_that_is_missing_is_named(member):
    original = LoopbackPlatform()
    names = {name: getattr(original, name) for name in MEMBERS if name != member}
    assert list(faults(SimpleNamespace(**names))) == [member]


def test_a_class_is_not_a_platform():
    (fault,) = validate_platform(LoopbackPlatform)
    assert "is a class" in fault.rule


@pytest.mark.parametrize(
    ("member", "value", "rule"),
    [
        ("name", 3, "is 3; it must be a string"),
        ("name", "", "must be a string that is not empty"),
        ("device", None, "missing"),
        ("rank", -1, "is -1; it must be at least 0 and below world_size=1"),
        ("rank", 1, "is 1; it must be at least 0 and below world_size=1"),
        ("rank", 0.0, "is 0.0; it must be an int"),
        ("rank", False, "is False; it must be an int"),
        ("world_size", 0, "is 0; a world has at least one rank"),
        ("world_size", "4", "is '4'; it must be an int"),
        ("capabilities", ["all_to_all"], "must be a mapping of Capability to Support"),
        ("capabilities", {"all_to_all": Support.FULL}, "has the key 'all_to_all'"),
        ("capabilities", {Capability.ALL_TO_ALL: True}, "is True; values must be members of Support"),
        ("barrier", 3, "is 3, which cannot be called"),
    ],
)
def test_values_of_the_wrong_kind(member, value, rule):
    assert any(rule in text for text in faults(broken(**{member: value}))[member])


def test_property_that_raises():
    def raising(self):
        raise OSError("driver crashed")

    assert faults(broken(rank=property(raising)))["rank"] == ["reading it raised OSError: driver crashed"]


@pytest.mark.parametrize(
    ("member", "function", "rule"),
    [
        ("new_group", lambda self: None, "must take 'ranks' as positional argument 1; it takes []"),
        ("new_group", lambda self, members: None, "must take 'ranks' as positional argument 1; it takes ['members']"),
        ("new_group", lambda self, members: None, "parameter 'members' is not in the protocol; give it a default"),
        ("barrier", lambda self, group: None, "parameter 'group' must have the default None"),
        ("all_reduce", lambda self, x, group=None, op="max": x, "'op' has the default 'max'; it must be 'sum'"),
        ("all_reduce", lambda self, x, op="sum", group=None: x, "must take 'group' as positional argument 2"),
        ("all_gather", lambda self, x, /, group=None: x, "must take 'x' by keyword"),
        ("all_gather", lambda self, x, *, group=None: x, "must take 'group' as positional argument 2"),
        ("to_host", lambda self, tensors: (), "must take any number of positional arguments, *tensors"),
        ("arange", lambda self, start, stop=None, step=1: None, "must take 'dtype' by keyword"),
        ("vjp", lambda self, function, *primals: None, "must take 'parameters' by keyword"),
    ],
)
def test_signatures_that_refuse_a_call_of_the_core(member, function, rule):
    assert any(rule in text for text in faults(broken(**{member: function}))[member])


@pytest.mark.parametrize(
    ("member", "function"),
    [
        ("new_group", lambda self, ranks, backend="gloo": None),
        ("all_gather", lambda self, *arguments, **options: None),
        ("arange", lambda self, start, stop=None, step=1, dtype=None: LoopbackPlatform().arange(start, stop, step)),
    ],
)
def test_signatures_that_take_more_are_right(member, function):
    assert validate_platform(broken(**{member: function})) == []


@pytest.mark.parametrize("name", [*ARRAY_FUNCTIONS, "int64"])
def test_each_name_that_the_namespace_lacks(name):
    original = LoopbackPlatform().xp
    names = {key: getattr(original, key) for key in dir(original) if key != name}
    assert list(faults(broken(xp=SimpleNamespace(**names)))) == [f"xp.{name}"]


def test_tensors_without_the_operators_of_the_subset():
    class Bare:
        shape = (3,)
        dtype = "int64"

    found = faults(broken(arange=lambda self, start, stop=None, step=1, *, dtype=None: Bare()))
    assert "tensor.ndim" in found
    assert "tensor.__matmul__" in found
    assert "tensor.__eq__" not in found
    assert found["is_tensor"] == ["is_tensor(arange(3)) is False; it must be True"]


def test_every_fault_is_in_the_one_error():
    platform = broken(rank=7, name="", barrier=None, new_group=lambda self: None)
    with pytest.raises(PlatformError) as caught:
        check_platform(platform)
    text = str(caught.value)
    for part in ("4 faults", "rank: is 7", "name: is ''", "barrier: is None", "new_group: must take 'ranks'"):
        assert part in text
    assert all(isinstance(fault, Fault) for fault in caught.value.faults)
    assert str(pickle.loads(pickle.dumps(caught.value))) == text, "ranks send their errors as pickles"


def test_the_comparison_covers_every_method_of_the_protocol():
    """A method that takes nothing at all is a fault wherever the protocol's takes something."""
    methods = [name for name in MEMBERS if inspect.isfunction(vars(Platform)[name])]
    assert len(methods) > 20
    platform = broken(**{name: lambda self: None for name in methods})
    assert set(methods) <= set(faults(platform))
