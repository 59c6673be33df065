# SPDX-License-Identifier: Apache-2.0
"""What the plugin says about itself, and what its probe finds."""

import importlib.util
import pkgutil

import hyperep_torch
import torch
from hyperep_torch import products
from hyperep_torch.probe import probe
from hyperep_torch.spec import hyperep_platform_spec

from hyperep.launch import Launcher
from hyperep.platform.capabilities import Capability, Support
from hyperep.platform.protocol import Platform


def test_the_spec_names_things_that_exist(platform):
    spec = hyperep_platform_spec()
    assert spec.name == platform.name == "torch"
    assert callable(pkgutil.resolve_name(spec.factory))
    assert pkgutil.resolve_name(spec.probe) is probe
    assert isinstance(pkgutil.resolve_name(spec.launcher), Launcher)


def test_the_platform_has_every_member_of_the_protocol(platform):
    assert isinstance(platform, Platform)
    assert set(platform.capabilities) == set(Capability)


def test_what_this_device_lacks_is_declared(platform, monkeypatch):
    assert platform.capabilities[Capability.GROUPED_MATMUL] is Support.FULL
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert not products.has_native_kernel(torch.device("cpu"), torch.float32)
    assert platform.capabilities[Capability.GROUPED_MATMUL] is Support.EMULATED


def test_the_probe_says_what_it_found():
    found = probe()
    assert found.viable
    assert found.framework == f"torch {torch.__version__}"
    assert "CPU" in found.reason


def test_the_probe_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert not probe().viable
    assert "torch 2.5.1+cpu is too old; pip install 'torch>=2.6'" in probe().reason
    monkeypatch.undo()
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert "without torch.distributed" in probe().reason
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert probe().reason == "torch is not installed; pip install torch"


def test_no_public_name_is_that_of_a_module():
    """Whichever of the two was imported last would be what the package has."""
    modules = {module.name for module in pkgutil.iter_modules(hyperep_torch.__path__)}
    assert not modules & set(hyperep_torch.__all__)
