# SPDX-License-Identifier: Apache-2.0
"""Plugins written for another version of the protocol: which run, and what is announced to their authors."""

from pathlib import Path

import numpy as np
import pytest

from hyperep.cli.doctor import announced
from hyperep.conformance import check_platform
from hyperep.conformance.report import Report
from hyperep.conformance.text import summary
from hyperep.loopback import LoopbackPlatform
from hyperep.loopback.spec import hyperep_platform_spec as loopback_spec
from hyperep.platform import completion, removals
from hyperep.platform.base import PlatformBase
from hyperep.platform.candidate import State
from hyperep.platform.errors import PlatformBroken
from hyperep.platform.protocol import Platform
from hyperep.platform.registry import Registry, register
from hyperep.platform.removals import Removal, class_made_by, used_by_class, used_by_spec
from hyperep.platform.spec import API_OLDEST, API_VERSION
from hyperep.platform.validate import validate_platform

GOES = "which goes in version 3; give the oldest and the newest version that it was written for, such as api=(1, 2)"


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "version_1"))
    import kept

    with register(kept, "kept"):
        yield kept


# Whole layers, forward and backward, rest on nearly everything else.
WHOLE = ["EP-balanced", "EP-levels", "TP-parity", "MOE-top2", "RS-values", "CUSTOM"]


def test_a_plugin_of_the_version_before_runs_and_is_told_what_goes(kept):
    assert kept.hyperep_platform_spec().versions[1] + 1 == API_VERSION, "keep a plugin of the version before this one"
    report = check_platform("kept", [2], only=WHOLE)
    assert report.passed, summary(report, details=True)
    assert len(report.ran) > 30
    assert report.announced == (f"platform 'kept' uses PlatformSpec.api_version, {GOES}",)
    assert f"Announced: platform 'kept' uses PlatformSpec.api_version, {GOES}" in summary(report)
    assert Report.from_json(report.to_json()) == report


def test_doctor_tells_what_goes(kept):
    assert announced([Registry().candidate("loopback")]) == []
    registry = Registry()
    with registry.register(kept, "kept"):
        assert announced([registry.candidate("kept")]) == [f"platform 'kept' uses PlatformSpec.api_version, {GOES}"]


@pytest.mark.parametrize(
    ("api", "state"),
    [
        ((API_OLDEST, API_OLDEST), State.VIABLE),
        ((API_VERSION, API_VERSION + 5), State.VIABLE),
        ((API_OLDEST, API_VERSION + 5), State.VIABLE),
        ((API_VERSION + 1, API_VERSION + 5), State.NOT_VIABLE),
    ],
)
def test_one_version_in_common_is_enough(site, api, state):
    site.install("alpha", api=api)
    (found,) = Registry().candidates()
    assert found.state is state


def test_without_a_version_in_common_the_older_side_is_named(site, monkeypatch):
    site.install("alpha", api=(API_VERSION + 1, API_VERSION + 2), probe="raise RuntimeError('probed')")
    (found,) = Registry().candidates()
    assert found.reason == (
        f"written for versions {API_VERSION + 1} to {API_VERSION + 2} of the platform protocol, while this hyperep "
        f"supports versions {API_OLDEST} to {API_VERSION}; install a newer release of hyperep"
    )
    monkeypatch.setattr("hyperep.platform.versions.API_OLDEST", API_VERSION + 3)
    monkeypatch.setattr("hyperep.platform.versions.API_VERSION", API_VERSION + 3)
    (found,) = Registry().candidates()
    assert found.reason.endswith(f"supports version {API_VERSION + 3}; install a newer release of hyperep-alpha")


@pytest.mark.parametrize("api", ["2", "(2,)", "(2, 1)", "(0, 1)", "('1', '2')", "(True, 2)", "[1, 2]", "None"])
def test_versions_that_are_none_are_a_fault_of_the_spec(site, api):
    site.install("alpha", api=api)
    (found,) = Registry().candidates()
    assert found.state is State.BROKEN
    assert "api=" in found.summary


def test_a_member_that_came_later_with_a_default_breaks_nobody(monkeypatch):
    class Structural:
        """Inherits nothing, and has what the protocol had when it was written."""

    old, framework = Structural(), LoopbackPlatform()
    for name in vars(Platform):
        if not name.startswith("_") and name not in ("swiglu", "copy_to_group", "stop_gradient"):
            setattr(old, name, getattr(framework, name))
    assert {fault.member for fault in validate_platform(old)} == {"swiglu", "copy_to_group", "stop_gradient"}
    assert completion.completed(old) is old
    assert validate_platform(old) == []
    x = framework.from_host(np.arange(3.0))
    outputs, pullback = old.vjp(lambda x: old.swiglu(x, old.stop_gradient(old.copy_to_group(x))), x)
    assert outputs.shape == pullback(x)[0].shape == (3,)
    own = old.swiglu
    assert completion.completed(old).swiglu is own, "what is there stays"
    sealed = type("Sealed", (), {"__slots__": (), "__repr__": lambda self: "<sealed>"})()
    with pytest.raises(PlatformBroken, match="<sealed> has no 'arange' and takes no attributes"):
        completion.completed(sealed)


def test_every_default_is_a_member_of_the_protocol_that_needs_no_base_class():
    members = {name for name in vars(Platform) if not name.startswith("_")}
    assert set(completion.DEFAULTS) <= members
    abstract = PlatformBase.__abstractmethods__ - {"group_size"}
    assert set(completion.DEFAULTS) | abstract == members


GOING = (
    Removal(member="Platform.swiglu", goes_in=4, instead="define grouped_swiglu"),
    Removal(member="PlatformSpec.priority", goes_in=4, instead="leave it out"),
)


def test_only_those_who_use_what_goes_are_told(kept):
    class Own(PlatformBase):
        def swiglu(self, gate, up):
            return gate

    class Heir(Own):
        pass

    assert used_by_class(Heir, GOING) == [GOING[0]]
    assert used_by_class(kept.KeptPlatform, GOING) == []
    assert used_by_spec(kept.hyperep_platform_spec(), GOING) == [GOING[1]]
    assert class_made_by(kept.hyperep_platform_spec()) is kept.KeptPlatform
    assert class_made_by(loopback_spec()) is None
    assert GOING[0].announce("x") == "platform 'x' uses Platform.swiglu, which goes in version 4; define grouped_swiglu"


def test_what_is_announced_exists_and_goes_in_the_next_version_or_later():
    members = {f"Platform.{name}" for name in vars(Platform)}
    fields = {f"PlatformSpec.{name}" for name in loopback_spec().__dataclass_fields__}
    for removal in removals.REMOVALS:
        assert removal.member in members | fields
        assert removal.goes_in > API_VERSION
