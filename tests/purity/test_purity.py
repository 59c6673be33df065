# SPDX-License-Identifier: Apache-2.0
"""No framework is needed, and none is touched, by anything in the core."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("without_frameworks.py")


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def report():
    return json.loads(python(str(PROGRAM)))


def test_platforms_are_listed_where_no_framework_can_be_imported(report):
    """A backend that is installed is then not viable, or viable without its framework's help, but never broken."""
    assert report["states"]["loopback"] == "viable"
    assert all(state != "broken" for state in report["states"].values()), report["states"]


def test_expert_parallelism_works_forward_and_backward_where_no_framework_can_be_imported(report):
    assert set(report["errors"]) >= {
        "output",
        "input gradient",
        "experts.w1",
        "experts.w2",
        "experts.w3",
        "router.gate",
    }
    assert max(report["errors"].values()) < 1e-5, report["errors"]
    assert report["asked_for"] == []


LIST_FRAMEWORKS = """
import sys
frameworks = {"torch", "torch_npu", "mindspore", "jax", "tensorflow"}
print(sorted({name.partition(".")[0] for name in sys.modules} & frameworks))
"""

IMPORT_EVERY_MODULE = """
import importlib, pkgutil, hyperep
names = [found.name for found in pkgutil.walk_packages(hyperep.__path__, "hyperep.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 40, names
"""


def test_importing_hyperep_imports_no_framework_and_nothing_of_weight():
    weight = "\nprint({'numpy', 'autograd', 'typer', 'rich', 'matplotlib'} & set(sys.modules))"
    assert python("-c", "import hyperep" + LIST_FRAMEWORKS + weight).split("\n")[:2] == ["[]", "set()"]


def test_importing_every_module_of_the_core_imports_no_framework():
    assert python("-c", IMPORT_EVERY_MODULE + LIST_FRAMEWORKS).strip() == "[]"
