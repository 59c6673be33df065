# SPDX-License-Identifier: Apache-2.0
"""The registry finds every plugin, guards itself against each, and hides none."""

import sys
import threading

import pytest

from hyperep.platform.candidate import State
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.errors import PlatformBroken, PlatformNotFound
from hyperep.platform.hookspecs import hookimpl
from hyperep.platform.registry import Registry
from hyperep.platform.spec import PlatformSpec


def test_installed_platform_is_described(site):
    site.install("alpha", version="1.2.3", priority=7)
    (found,) = Registry().candidates()
    assert (found.name, found.state, found.reason) == ("alpha", State.VIABLE, "found")
    assert (found.distributions, found.versions) == (("hyperep-alpha",), ("1.2.3",))
    assert found.spec.priority == 7
    assert found.spec.capabilities[Capability.FLOAT64] is Support.EMULATED


def test_nothing_installed(site):
    assert Registry().candidates() == ()


def test_names_are_known_without_importing_any_plugin(site):
    module = site.install("alpha", before="raise RuntimeError('imported')")
    assert Registry().names() == ("alpha",)
    assert module not in sys.modules


def test_distribution_without_metadata_file_is_found_and_named(site):
    site.install("alpha", version="3.1", metadata=False)
    (found,) = Registry().candidates()
    assert (found.distributions, found.versions) == (("hyperep_alpha",), ("3.1",))


def test_unreadable_entry_points_are_broken_where_they_are_ours_and_ignored_where_they_are_not(site):
    site.install("alpha")
    for distribution, group in (("ours", "hyperep.platforms"), ("theirs", "console_scripts")):
        info = site.folder / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(f"[{group}]\nno equals sign\n")
    alpha, ours = Registry().candidates()
    assert (alpha.name, alpha.state) == ("alpha", State.VIABLE)
    assert (ours.name, ours.state) == ("ours", State.BROKEN)
    assert "entry_points.txt of ours 1.0 cannot be read" in ours.summary


def test_metadata_that_is_no_text_does_not_stop_the_search(site):
    site.install("alpha", version="3.1")
    (site.folder / "hyperep_alpha-3.1.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    garbage = site.folder / "garbage-1.0.dist-info"
    garbage.mkdir()
    (garbage / "entry_points.txt").write_bytes(b"\xff\xfe[hyperep.platforms]")
    (found,) = Registry().candidates()
    assert (found.name, found.distributions, found.state) == ("alpha", ("hyperep_alpha",), State.VIABLE)


@pytest.mark.parametrize("spelling", ["hyperep-alpha", "Hyperep_Alpha", "hyperep.alpha", "HYPEREP--alpha"])
def test_distribution_that_is_on_the_path_twice_is_no_conflict(site, tmp_path, monkeypatch, spelling):
    site.install("alpha", version="2.0")
    second = tmp_path / "second"
    second.mkdir()
    type(site)(second).install("alpha", distribution=spelling, version="1.0")
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    (found,) = Registry().candidates()
    assert (found.state, found.versions) == (State.VIABLE, ("2.0",))


PANIC = "raise type('PanicException', (BaseException,), {})('called `Option::unwrap()` on a `None` value')"
"""What an extension that is written in Rust does when it panics."""
MUTE = "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})"


# ------------------------------------ a plugin that fails: pitfalls 34, 35, 37, 38
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"before": "import no_such_framework"}, "No module named 'no_such_framework'"),
        ({"before": "raise RuntimeError('at import')"}, "RuntimeError: at import"),
        ({"before": "raise SystemExit('leaving')"}, "SystemExit: leaving"),
        ({"before": PANIC}, "PanicException: called `Option::unwrap()` on a `None` value"),
        ({"before": "raise GeneratorExit"}, "GeneratorExit: no message"),
        ({"hook": PANIC}, "PanicException: called"),
        ({"probe": PANIC}, "PanicException: called"),
        ({"probe": MUTE}, "Mute: its message cannot be had"),
        ({"source": "def broken(:"}, "SyntaxError"),
        ({"hook": "raise KeyError('in the hook')"}, "KeyError: 'in the hook'"),
        ({"probe": "raise OSError('driver crashed')"}, "OSError: driver crashed"),
        ({"probe": "return True"}, "returned True; it must return a Viability"),
        ({"probe": "pass"}, "returned None; it must return a Viability"),
        ({"hook": "return {}"}, "returned {}; it must return a PlatformSpec"),
        ({"source": "x = 1"}, "implements no hook hyperep_platform_spec"),
        ({"spec_name": "beta"}, "the spec's name 'beta' differs from its entry point's name 'alpha'"),
        ({"factory": "no colon"}, "factory='no colon' must be a 'package.module:name' string"),
        ({"api": "'1'"}, "api='1' must be the oldest and the newest version, such as (1, 2)"),
        ({"priority": "'high'"}, "priority='high' must be an int"),
    ],
)
def test_failing_plugin_is_broken_with_its_traceback_and_the_others_are_unharmed(site, fault, message):
    module = site.install("alpha", **fault)
    site.install("beta")
    alpha, beta = Registry().candidates()
    assert (alpha.name, alpha.state) == ("alpha", State.BROKEN)
    assert message in alpha.summary
    assert "Traceback (most recent call last)" in alpha.reason
    if "source" not in fault:
        assert module in alpha.reason
    assert (beta.name, beta.state) == ("beta", State.VIABLE)


def test_an_interrupt_is_the_user_s_and_not_the_plugin_s(site):
    site.install("alpha", before="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry().candidates()


def test_every_fault_of_a_spec_is_told_at_once(site):
    site.install("alpha", spec_name="beta", priority="None", factory="nowhere")
    (found,) = Registry().candidates()
    for fault in ("'beta'", "priority=None", "factory='nowhere'"):
        assert fault in found.summary


def test_circular_import_in_a_probe_is_reported_and_does_not_make_the_plugin_vanish(site):
    (site.folder / "circular_a.py").write_text("import circular_b\nvalue = 1\n")
    (site.folder / "circular_b.py").write_text("from circular_a import value\n")
    site.install("alpha", probe="import circular_a")
    (found,) = Registry().candidates()
    assert found.state is State.BROKEN
    assert "circular_a" in found.summary
    assert "circular import" in found.summary


@pytest.mark.parametrize("place", ["before", "hook", "probe"])
def test_plugin_that_asks_the_registry_for_itself_is_told_so(site, place):
    ask = "from hyperep.platform.registry import default_registry; default_registry().candidates()"
    site.install("alpha", **{place: ask})
    from hyperep.platform.registry import default_registry

    (found,) = default_registry().candidates()
    assert found.state is State.BROKEN
    assert "asks the registry for itself" in found.summary


def test_absent_device_is_not_viable_although_the_package_is_installed(site):
    site.install("alpha", probe='return Viability.no("no NPU is visible")')
    (found,) = Registry().candidates()
    assert (found.state, found.summary) == (State.NOT_VIABLE, "no NPU is visible")
    assert "pip install hyperep-alpha" in found.describe()


# ------------------------------------ conflict: pitfall 36
def test_two_distributions_with_one_name_are_both_named_and_neither_is_imported(site):
    modules = [
        site.install("alpha", distribution="first-dist", version="1.0"),
        site.install("alpha", distribution="second-dist", version="2.0"),
    ]
    (found,) = Registry().candidates()
    assert found.state is State.BROKEN
    assert set(found.distributions) == {"first-dist", "second-dist"}
    for text in ("first-dist 1.0", "second-dist 2.0", "uninstall all but one"):
        assert text in found.reason
    assert not set(modules) & set(sys.modules)


# ------------------------------------ independence: pitfall 39
def test_asking_for_one_platform_looks_at_no_other(site):
    site.install("alpha")
    other = site.install("beta", before="import os; os.environ['HYPEREP_PLATFORM'] = 'beta'")
    assert Registry().candidate("alpha").state is State.VIABLE
    assert other not in sys.modules


def test_plugin_is_described_and_probed_once_whoever_asks(site):
    slow = "calls.append(1); time.sleep(0.05); return Viability.yes(str(len(calls)))"
    site.install("alpha", probe=slow, before="import time; calls = []")
    registry = Registry()
    found = []
    threads = [threading.Thread(target=lambda: found.append(registry.candidate("alpha"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [candidate.reason for candidate in found] == ["1"] * 4


# ------------------------------------ blocking
def test_environment_variable_blocks_without_importing(site, monkeypatch):
    alpha = site.install("alpha")
    site.install("beta")
    monkeypatch.setenv("HYPEREP_BLOCK", "gamma, alpha")
    found = {candidate.name: candidate for candidate in Registry().candidates()}
    assert found["alpha"].state is State.BLOCKED
    assert "HYPEREP_BLOCK=gamma, alpha" in found["alpha"].reason
    assert found["beta"].state is State.VIABLE
    assert alpha not in sys.modules


def test_blocked_platform_is_back_when_the_variable_goes(site, monkeypatch):
    site.install("alpha")
    registry = Registry()
    monkeypatch.setenv("HYPEREP_BLOCK", "alpha")
    assert registry.candidate("alpha").state is State.BLOCKED
    monkeypatch.delenv("HYPEREP_BLOCK")
    assert registry.candidate("alpha").state is State.VIABLE


@pytest.mark.parametrize("looked_at_before", [False, True])
def test_plugin_manager_blocks(site, looked_at_before):
    site.install("alpha")
    registry = Registry()
    if looked_at_before:
        registry.candidates()
    registry.manager.set_blocked("alpha")
    (found,) = registry.candidates()
    assert found.state is State.BLOCKED
    assert "set_blocked" in found.reason


# ------------------------------------ registered by a program
class _Plugin:
    """A plugin that is an object."""

    def __init__(self, name):
        self._name = name

    @hookimpl
    def hyperep_platform_spec(self):
        probe = "hyperep.platform.spec:Viability.yes"
        return PlatformSpec(name=self._name, api=(2, 2), factory="builtins:object", probe=probe)


def test_object_is_registered_for_a_block_only():
    registry = Registry()
    with registry.register(_Plugin("mine"), "mine"):
        assert registry.candidate("mine").state is State.VIABLE
    with pytest.raises(PlatformNotFound, match="'mine'"):
        registry.candidate("mine")
    with registry.register(_Plugin("mine"), "mine"):
        assert registry.candidate("mine").state is State.VIABLE


def test_registering_an_installed_name_is_a_conflict_while_it_lasts(site):
    site.install("alpha")
    registry = Registry()
    assert registry.candidate("alpha").state is State.VIABLE
    with registry.register(_Plugin("alpha"), "alpha"):
        found = registry.candidate("alpha")
        assert found.state is State.BROKEN
        assert "the running program" in found.reason
        assert "hyperep-alpha 1.0" in found.reason
    assert registry.candidate("alpha").state is State.VIABLE


def test_viable_candidate_has_no_error(site):
    site.install("alpha")
    (found,) = Registry().candidates()
    with pytest.raises(AssertionError):
        found.error()


def test_broken_candidate_error_holds_the_traceback(site):
    site.install("alpha", probe="raise OSError('driver crashed')")
    error = Registry().candidate("alpha").error()
    assert isinstance(error, PlatformBroken)
    assert "Traceback" in str(error)
