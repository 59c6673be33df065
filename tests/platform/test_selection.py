# SPDX-License-Identifier: Apache-2.0
"""Which platform ``get_platform`` returns, rule by rule, and what it says when it returns none."""

import contextvars
import threading
import warnings

import pytest

from hyperep.loopback import run
from hyperep.platform.errors import (
    PlatformBroken,
    PlatformConflict,
    PlatformNotFound,
    PlatformNotViable,
    PlatformPassedOver,
)
from hyperep.platform.registry import default_registry
from hyperep.platform.selection import adopt_mesh, get_platform, live_platforms, use_platform


class Stub:
    """As much of a platform as selection looks at."""

    def __init__(self, name, mesh=None):
        self.name = name
        self.mesh = mesh

    def adopt_mesh(self, mesh):
        return self.mesh if mesh == "native" else None


NOT_HERE = 'return Viability.no("no device")'


# ------------------------------------ order of the rules
def test_argument_beats_scope_and_environment(site, monkeypatch):
    for name in ("alpha", "beta", "gamma"):
        site.install(name)
    monkeypatch.setenv("HYPEREP_PLATFORM", "beta")
    with use_platform("gamma"):
        assert get_platform("alpha").name == "alpha"


def test_scope_beats_environment(site, monkeypatch):
    site.install("alpha")
    site.install("beta")
    monkeypatch.setenv("HYPEREP_PLATFORM", "beta")
    with use_platform("alpha"):
        assert get_platform().name == "alpha"
    assert get_platform().name == "beta"


def test_environment_beats_priority(site, monkeypatch):
    site.install("alpha", priority=5)
    site.install("beta")
    monkeypatch.setenv("HYPEREP_PLATFORM", "beta")
    assert get_platform().name == "beta"


def test_empty_environment_variable_is_as_good_as_none(site, monkeypatch):
    site.install("alpha")
    monkeypatch.setenv("HYPEREP_PLATFORM", "")
    assert get_platform().name == "alpha"


def test_only_viable_one(site):
    site.install("alpha")
    site.install("beta", probe=NOT_HERE, priority=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_platform().name == "alpha"


def test_unique_highest_priority(site):
    site.install("alpha", priority=-100)
    site.install("beta", priority=10)
    site.install("gamma", priority=3)
    assert get_platform().name == "beta"


def test_tie_lists_every_candidate_with_its_reason(site):
    site.install("alpha")
    site.install("beta")
    site.install("gamma", probe=NOT_HERE)
    site.install("delta", probe="raise OSError('driver crashed')")
    with pytest.raises(PlatformNotFound) as caught:
        get_platform()
    text = str(caught.value)
    for part in ("'alpha', 'beta'", "gamma: not viable, no device", "delta: broken, OSError: driver crashed"):
        assert part in text
    assert "HYPEREP_PLATFORM" in text


def test_blocking_breaks_a_tie(site, monkeypatch):
    site.install("alpha")
    site.install("beta")
    monkeypatch.setenv("HYPEREP_BLOCK", "alpha")
    assert get_platform().name == "beta"


# ------------------------------------ no silent fall back: pitfall 34
@pytest.mark.parametrize("fault", [NOT_HERE, "raise OSError('driver crashed')"])
def test_reference_platform_never_stands_in_for_one_that_fails(site, fault):
    site.install("alpha", probe=fault)
    site.install("reference", priority=-100)
    with pytest.raises(PlatformNotFound, match="never stands in") as caught:
        get_platform()
    assert "alpha: " in str(caught.value)
    assert get_platform("reference").name == "reference"


def test_reference_platform_is_chosen_when_it_is_alone_or_the_others_are_ruled_out(site, monkeypatch):
    site.install("reference", priority=-100)
    assert get_platform().name == "reference"
    site.install("alpha", probe=NOT_HERE)
    default_registry.cache_clear()
    monkeypatch.setenv("HYPEREP_BLOCK", "alpha")
    assert get_platform().name == "reference"


@pytest.mark.parametrize("fault", [NOT_HERE, "raise OSError('driver crashed')"])
def test_passing_over_a_platform_that_fails_is_said(site, fault):
    site.install("alpha", probe=fault, priority=10)
    site.install("beta")
    with pytest.warns(PlatformPassedOver, match="alpha: "):
        assert get_platform().name == "beta"


@pytest.mark.parametrize("fault", [{"probe": NOT_HERE}, {"before": "import no_such_framework"}])
@pytest.mark.parametrize("name", ["alpha", "gamma"])  # before and after the chosen one
def test_passing_over_a_platform_of_equal_priority_is_said(site, fault, name):
    site.install(name, **fault)
    site.install("beta", priority=0)
    with pytest.warns(PlatformPassedOver, match=f"{name}: "):
        assert get_platform().name == "beta"


def test_reference_platform_does_not_stand_in_for_another_one_of_its_priority(site):
    site.install("alpha", probe=NOT_HERE, priority=-100)
    site.install("reference", priority=-100)
    with pytest.raises(PlatformNotFound, match="never stands in"):
        get_platform()


def test_no_viable_platform(site):
    site.install("alpha", probe=NOT_HERE)
    with pytest.raises(PlatformNotFound, match=r"alpha: not viable, no device \(install: pip install hyperep-alpha\)"):
        get_platform()


def test_no_platform_at_all(site):
    with pytest.raises(PlatformNotFound, match="pip install hyperep-torch"):
        get_platform()


# ------------------------------------ a name and its errors
def test_unknown_name_lists_what_is_installed_and_what_is_close(site):
    site.install("alpha")
    site.install("beta")
    with pytest.raises(PlatformNotFound, match="unknown platform 'alpa'; installed: alpha, beta; did you mean 'alpha'"):
        get_platform("alpa")


def test_unknown_name_in_the_environment_names_the_variable(site, monkeypatch):
    site.install("alpha")
    monkeypatch.setenv("HYPEREP_PLATFORM", "zeta")
    with pytest.raises(PlatformNotFound, match=r"unknown platform 'zeta' \(HYPEREP_PLATFORM=zeta\); installed: alpha$"):
        get_platform()


def test_named_platform_that_is_not_viable(site, monkeypatch):
    site.install("alpha", probe=NOT_HERE)
    site.install("beta")
    with pytest.raises(PlatformNotViable, match="no device; to install what is missing: pip install hyperep-alpha"):
        get_platform("alpha")
    monkeypatch.setenv("HYPEREP_PLATFORM", "alpha")
    with pytest.raises(PlatformNotViable, match="HYPEREP_PLATFORM=alpha"):
        get_platform()


def test_named_platform_that_is_blocked(site, monkeypatch):
    site.install("alpha")
    monkeypatch.setenv("HYPEREP_BLOCK", "alpha")
    with pytest.raises(PlatformNotViable, match="HYPEREP_BLOCK=alpha"):
        get_platform("alpha")


def test_named_platform_that_is_broken(site):
    site.install("alpha", before="import no_such_framework")
    with pytest.raises(PlatformBroken, match="no_such_framework"):
        get_platform("alpha")


def test_named_platform_that_two_distributions_claim(site):
    site.install("alpha", distribution="first-dist")
    site.install("alpha", distribution="second-dist")
    with pytest.raises(PlatformConflict, match=r"first-dist.*second-dist|second-dist.*first-dist"):
        get_platform("alpha")


# ------------------------------------ options and the cache
def test_one_object_for_each_name_and_options(site):
    site.install("alpha")
    site.install("beta")
    assert get_platform("alpha") is get_platform("alpha")
    assert get_platform("alpha", device="npu") is get_platform("alpha", device="npu")
    assert get_platform("alpha", device="npu") is not get_platform("alpha")
    assert get_platform("beta") is not get_platform("alpha")
    assert get_platform("alpha", device="npu").options == {"device": "npu"}


def test_option_that_the_platform_does_not_take(site):
    site.install("alpha")
    with pytest.raises(TypeError, match=r"'alpha' does not take the options {'devise': 1}.*device='cpu'"):
        get_platform("alpha", devise=1)


def test_option_that_cannot_be_hashed(site):
    site.install("alpha")
    with pytest.raises(TypeError, match=r"device=\['cpu'\].*pass a tuple"):
        get_platform("alpha", device=["cpu"])


@pytest.mark.parametrize("factory", ["no_such_module:make", "hyperep_alpha:no_such_name", "builtins:dict"])
def test_factory_that_makes_no_platform(site, factory):
    site.install("alpha", factory=factory)
    with pytest.raises(PlatformBroken, match=factory):
        get_platform("alpha")


def test_error_of_a_factory_is_its_own(site):
    site.install("alpha", before="def fail(): raise ZeroDivisionError('in the factory')", factory="hyperep_alpha:fail")
    with pytest.raises(ZeroDivisionError, match="in the factory"):
        get_platform("alpha")


@pytest.mark.parametrize("error", ["SystemExit", "type('PanicException', (BaseException,), {})"])
def test_factory_that_panics_is_broken(site, error):
    site.install("alpha", before=f"def fail(): raise {error}('in the factory')", factory="hyperep_alpha:fail")
    with pytest.raises(PlatformBroken, match=r"'hyperep_alpha:fail' ended with \w+: in the factory"):
        get_platform("alpha")


def test_factory_whose_module_panics_is_broken(site):
    (site.folder / "panics.py").write_text("raise type('PanicException', (BaseException,), {})('at import')")
    site.install("alpha", factory="panics:make")
    with pytest.raises(PlatformBroken, match=r"'panics:make' cannot be imported: PanicException: at import"):
        get_platform("alpha")


# ------------------------------------ the scope
def test_scope_holds_objects_and_nests(site):
    site.install("alpha")
    outer, inner = Stub("alpha"), Stub("other")
    with use_platform(outer), use_platform(inner) as held:
        assert held is inner
        assert get_platform() is inner
        assert get_platform("alpha") is outer, "the scope's own platform of that name, not a second one"
    assert get_platform("alpha") is not outer


def test_scope_is_left_after_an_error(site):
    site.install("alpha")
    with pytest.raises(KeyError), use_platform(Stub("other")):
        raise KeyError
    assert get_platform().name == "alpha"


def test_scoped_platform_takes_no_options(site):
    with use_platform(Stub("alpha")), pytest.raises(ValueError, match=r"{'device': 'npu'}.*'alpha'.*already in scope"):
        get_platform("alpha", device="npu")


def test_each_thread_sees_its_own_rank(site):
    site.install("alpha")
    ranks = [Stub("alpha") for _ in range(3)]
    seen = {}
    all_in = threading.Barrier(len(ranks))

    def run(index):
        with use_platform(ranks[index]):
            all_in.wait(timeout=30)
            seen[index] = get_platform(), get_platform("alpha")
            all_in.wait(timeout=30)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, i)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == {i: (rank, rank) for i, rank in enumerate(ranks)}
    assert get_platform("alpha") not in ranks, "a rank's platform must not leak into the process"


def test_scope_by_an_unknown_name_fails_at_once(site):
    with pytest.raises(PlatformNotFound, match="'alpha'"), use_platform("alpha"):
        pytest.fail("the block must not be entered")


# ------------------------------------ native meshes
def test_platform_in_scope_adopts_a_mesh_before_others(site):
    site.install("alpha")
    get_platform("alpha")
    with use_platform(Stub("outer", "outer's")), use_platform(Stub("inner", "inner's")):
        assert adopt_mesh("native") == "inner's"
    with use_platform(Stub("outer", "outer's")), use_platform(Stub("inner")):
        assert adopt_mesh("native") == "outer's"


def test_selected_platform_is_made_to_adopt_a_mesh(site):
    site.install("alpha", before="", factory="hyperep_alpha:adopting", hook=ADOPTING)
    assert live_platforms() == ()
    assert adopt_mesh("native") == "alpha's"
    assert [platform.name for platform in live_platforms()] == ["alpha"]


ADOPTING = """global adopting
    class Adopting(FakePlatform):
        def adopt_mesh(self, mesh):
            return "alpha's"
    adopting = Adopting
"""


def test_unknown_mesh_names_its_type_and_the_way_out(site):
    with use_platform(Stub("alpha")), pytest.raises(TypeError) as caught:
        adopt_mesh([[0, 1]])
    for part in ("mesh=[[0, 1]]", "builtins.list", "alpha", "init_device_mesh(platform, shape, mesh_dim_names)"):
        assert part in str(caught.value)


def test_unknown_mesh_where_no_platform_can_be_chosen(site):
    with pytest.raises(TypeError, match=r"builtins\.int") as caught:
        adopt_mesh(4)
    assert isinstance(caught.value.__cause__, PlatformNotFound)


def test_each_loopback_rank_is_the_platform_of_its_own_thread():
    def on_rank(platform):
        return get_platform() is platform and get_platform("loopback") is platform

    assert run(on_rank, 4) == [True] * 4
