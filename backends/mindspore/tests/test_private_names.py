# SPDX-License-Identifier: Apache-2.0
"""A MindSpore that has moved an undocumented name must be found out here, with the name."""

import re
from pathlib import Path

import hyperep_mindspore
import pytest
from hyperep_mindspore import private_names
from hyperep_mindspore.private_names import NAMES, PrivateName


@pytest.mark.parametrize("name", NAMES, ids=lambda n: f"{n.module}.{n.name}")
def test_this_version_has_it(name):
    assert name.load() is not None
    assert name.reason.endswith(".")


def test_a_missing_one_is_named_with_the_way_out():
    missing = PrivateName(module="mindspore.common", name="_gone", reason="It is wanted here.")
    with pytest.raises(ImportError, match=r"mindspore [\d.]+ has no mindspore\.common\._gone.*wanted here.*Install"):
        missing.load()


def test_no_other_module_uses_one():
    for file in Path(hyperep_mindspore.__file__).parent.glob("*.py"):
        if file.name != Path(private_names.__file__).name:
            found = re.findall(r"mindspore[\w.]*\._[a-z]\w*|from mindspore[\w.]* import [^\n]*\b_\w+", file.read_text())
            assert not found, f"{file.name}: {found}"
