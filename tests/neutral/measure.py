# SPDX-License-Identifier: Apache-2.0
"""What the neutral cases measure with: data, relative errors, gradients, calls. Runs on every platform."""

import contextlib
from collections import Counter

import numpy as np


def rows(seed, *shape):
    """Float32 data of size O(1), different for each seed."""
    return np.random.default_rng(1000 + seed).normal(size=shape).astype(np.float32)


def relative(value, reference):
    """Largest deviation from the reference, relative to its largest entry; its size must be worth comparing."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    if reference.size == 0:
        return 0.0
    scale = np.abs(reference).max()
    assert scale > 1e-2, f"reference of size {scale}: too small to tell right from zero"
    return float(np.abs(value - reference).max() / scale)


def fill_weights(platform, module, seed=7):
    """Overwrite every parameter with values that make outputs and gradients O(1); the same on all ranks."""
    rng = np.random.default_rng(seed)
    for parameter in platform.parameters(module).values():
        shape = tuple(parameter.shape)
        value = 1.5 * rng.normal(size=shape) / np.sqrt(shape[-1])
        platform.assign(parameter, platform.from_host(value.astype(np.float32)))


def forward_backward(platform, module, cotangent, x, *inputs):
    """Output, gradient of ``x``, and gradients of the local parts of all parameters by path; as NumPy arrays."""
    handles = platform.parameters(module)
    tensors = tuple(platform.from_host(value) for value in inputs)

    def function(x):
        return module(x, *tensors)

    out, pullback = platform.vjp(function, platform.from_host(x), parameters=list(handles.values()))
    gradients = platform.to_host(*pullback(platform.from_host(cotangent)))
    return platform.to_host(out)[0], gradients[0], dict(zip(handles, gradients[1:], strict=True))


@contextlib.contextmanager
def replaced(platform, **members):
    """Members of one platform object are others for a while."""
    for name, value in members.items():
        setattr(platform, name, value)
    try:
        yield
    finally:
        for name in members:
            delattr(platform, name)


@contextlib.contextmanager
def rows_computed(platform):
    """Yield a list of how many rows this rank's experts get at each call."""
    found = []
    original = platform.grouped_swiglu

    def noting(x, *weights):
        found.append(x.shape[0])
        return original(x, *weights)

    with replaced(platform, grouped_swiglu=noting):
        yield found


def everywhere(platform, number):
    """The sum of a number over all ranks."""
    return int(platform.to_host(platform.all_reduce(platform.from_host(np.array([number]))))[0][0])


@contextlib.contextmanager
def counted(platform, *names):
    """Yield a counter of the calls of the named members."""
    calls = Counter()

    def counting(name, member):
        def call(*args, **kwargs):
            calls[name] += 1
            return member(*args, **kwargs)

        return call

    with replaced(platform, **{name: counting(name, getattr(platform, name)) for name in names}):
        yield calls
