# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device, and ``arange``."""

from __future__ import annotations

import numpy as np

from hyperep.conformance.case import Case
from hyperep.conformance.requirement import requirement
from hyperep.platform.capabilities import Capability

PORT = "host copies"
_ARRAYS = (
    np.array([[1.5, -2.5], [0.0, 3e30]], np.float32),
    np.array([2**31 - 1, -(2**31)], np.int32),
    np.array([2**53 + 1, -(2**62)], np.int64),
    np.array([True, False, True]),
    np.zeros((0, 3), np.float32),
    np.zeros((2, 0), np.int64),
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
)


@requirement(
    "HOST-roundtrip", "from_host then to_host gives the same values, shape and dtype, also without elements.", port=PORT
)
def roundtrip(case: Case) -> None:
    for array in _ARRAYS:
        case.equal(case.tensor(array), array, f"{array.dtype}{list(array.shape)}")


@requirement(
    "HOST-several",
    "to_host takes tensors of several dtypes and shapes at once, and returns them in order.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def several(case: Case) -> None:
    arrived = case.platform.to_host(*(case.tensor(array) for array in _ARRAYS))
    case.is_true(
        isinstance(arrived, tuple) and len(arrived) == len(_ARRAYS), f"must be a tuple of {len(_ARRAYS)} arrays"
    )
    for number, (got, want) in enumerate(zip(arrived, _ARRAYS, strict=True)):
        case.equal(got, want, f"tensor {number} of {len(_ARRAYS)}")
    case.is_true(case.platform.to_host() == (), "to_host() of nothing must be ()")


@requirement(
    "HOST-from-host-copies",
    "A NumPy array may be changed after from_host without changing the tensor.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def from_host_copies(case: Case) -> None:
    array = np.arange(6, dtype=np.float32)
    tensor = case.platform.from_host(array)
    array[:] = -1
    case.equal(tensor, np.arange(6, dtype=np.float32), "the tensor, after the array was overwritten")


@requirement(
    "HOST-to-host-owns",
    "An array from to_host owns its memory: writing to it does not change the tensor.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def to_host_owns(case: Case) -> None:
    tensor = case.tensor(np.arange(6, dtype=np.float32))
    array = case.host(tensor)
    case.is_true(array.flags.writeable, "the array cannot be written to")
    array[:] = -1
    case.equal(tensor, np.arange(6, dtype=np.float32), "the tensor, after its copy was overwritten")


@requirement(
    "HOST-strided",
    "Transposed and sliced arrays and tensors are copied by their values, not by their memory.",
    port=PORT,
    needs=("HOST-roundtrip", "XP-permute-dims"),
)
def strided(case: Case) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    case.equal(case.tensor(array.T), array.T, "a transposed array")
    case.equal(case.tensor(array[:, ::2]), array[:, ::2], "an array with a stride")
    case.equal(case.tensor(array[::-1]), array[::-1], "an array read backwards")
    case.equal(case.xp.permute_dims(case.tensor(array), (1, 0)), array.T, "a transposed tensor")
    case.equal(case.tensor(array)[:, 1:3], array[:, 1:3], "a sliced tensor")


@requirement(
    "HOST-detached",
    "to_host works on a tensor that is being differentiated, and stays outside autodiff.",
    port=PORT,
    capabilities=(Capability.AUTODIFF,),
    needs=("VJP-gradients",),
)
def detached(case: Case) -> None:
    seen = []

    def function(x):  # type: ignore[no-untyped-def]
        y = 3 * x
        seen.append(case.host(y))
        return y * y

    x = case.normal((4,), 1)
    _, (gradient,) = case.gradients(function, [x], np.ones(4, np.float32))
    case.close(seen[0], 3 * x, "the value read in the middle")
    case.close(gradient, 18 * x, "the gradient")


@requirement(
    "HOST-arange",
    "arange gives evenly spaced integers, int64 unless told otherwise, also none at all.",
    port=PORT,
    needs=("HOST-roundtrip",),
)
def arange(case: Case) -> None:
    platform = case.platform
    case.equal(platform.arange(5), np.arange(5), "arange(5)")
    case.equal(platform.arange(2, 9), np.arange(2, 9), "arange(2, 9)")
    case.equal(platform.arange(1, 10, 4), np.arange(1, 10, 4), "arange(1, 10, 4)")
    case.equal(platform.arange(0), np.arange(0), "arange(0)")
    case.equal(platform.arange(4, dtype=case.xp.int32), np.arange(4, dtype=np.int32), "arange(4, dtype=int32)")
    case.equal(platform.arange(70_000), np.arange(70_000), "arange(70000)")
    start = 2**53 + 1  # past what floats count
    case.equal(platform.arange(start, start + 7, 2), np.arange(start, start + 7, 2), f"arange({start}, {start + 7}, 2)")
