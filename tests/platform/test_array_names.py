# SPDX-License-Identifier: Apache-2.0
"""The helper for array functions that have other names."""

from types import SimpleNamespace

import numpy as np
import pytest

from hyperep.loopback import LoopbackPlatform
from hyperep.platform.array_names import array_namespace
from hyperep.platform.array_subset import ARRAY_DTYPES, ARRAY_FUNCTIONS
from hyperep.platform.validate import validate_platform

THEIRS = SimpleNamespace(
    cat=lambda arrays, dim=0: np.concatenate(arrays, axis=dim),
    sum=lambda x, dim=None, keepdim=False: np.sum(x, axis=dim, keepdims=keepdim),
    float32="their float32",
    f64="their float64",
)
X = np.arange(6.0).reshape(2, 3)


def test_names_and_arguments_are_those_of_the_standard():
    xp = array_namespace(
        THEIRS, names={"concat": "cat", "float64": "f64"}, keywords={"axis": "dim", "keepdims": "keepdim"}
    )
    assert xp.concat([X, X], axis=1).shape == (2, 6)
    assert xp.sum(X, axis=0, keepdims=True).shape == (1, 3)
    assert xp.sum(X) == 15
    assert (xp.float32, xp.float64) == ("their float32", "their float64")
    assert not hasattr(xp, "stack"), "what is not there is not invented"
    assert not hasattr(xp, "bfloat16")


def test_the_author_s_own_come_first_and_are_left_alone():
    own = {"sum": lambda x, axis=None: "mine", "bfloat16": "mine too", "helper": 3}
    xp = array_namespace(THEIRS, np, names={"concat": "cat"}, keywords={"axis": "dim"}, own=own)
    assert (xp.sum(X, axis=0), xp.bfloat16, xp.helper) == ("mine", "mine too", 3)
    assert xp.exp(X) is not None, "the second home is asked where the first has nothing"
    assert xp.int64 is np.int64


def test_an_optional_dtype_that_is_not_wanted_is_absent():
    xp = array_namespace(np, dtypes=("float64",))
    assert hasattr(xp, "float64")
    assert not hasattr(xp, "float16")


def test_a_name_that_nobody_asks_for_is_a_mistake():
    with pytest.raises(ValueError, match=r"names=\['permute_dim'\] are not in hyperep.platform.array_subset"):
        array_namespace(np, names={"permute_dim": "transpose"})


def test_a_whole_namespace_made_so_is_a_platform_s():
    theirs = LoopbackPlatform().xp
    odd = SimpleNamespace(**{f"odd_{name}": getattr(theirs, name) for name in (*ARRAY_FUNCTIONS, *ARRAY_DTYPES)})
    xp = array_namespace(odd, names={name: f"odd_{name}" for name in (*ARRAY_FUNCTIONS, *ARRAY_DTYPES)})
    assert validate_platform(type("Renamed", (LoopbackPlatform,), {"xp": xp})()) == []
