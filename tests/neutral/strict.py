# SPDX-License-Identifier: Apache-2.0
"""A platform of one rank whose tensors and namespace have what is declared, and not one name more. Records nothing."""

import types

import numpy as np

from hyperep.loopback.array_namespace import array_namespace
from hyperep.loopback.platform import LoopbackPlatform
from hyperep.platform.array_subset import ARRAY_ATTRIBUTES, ARRAY_DTYPES, ARRAY_FUNCTIONS, ARRAY_OPERATORS


class StrictDtype:
    """A dtype that is compared with dtypes of the namespace, and with nothing else."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype):
        self._dtype = np.dtype(dtype)

    def __eq__(self, other):
        if isinstance(other, StrictDtype):
            return self._dtype == other._dtype
        if not isinstance(other, np.dtype | type):
            raise TypeError(f"the core compared a dtype with {other!r}, which is none")
        return self._dtype == other

    def __hash__(self):
        return hash(self._dtype)

    def __str__(self):
        return str(self._dtype)

    __repr__ = __str__


class StrictHandle:
    """A parameter or buffer that only the platform looks into: ``local`` reads it, ``assign`` writes it."""

    __slots__ = ("__weakref__", "_parameter")

    def __init__(self, parameter):
        self._parameter = parameter

    def __getattr__(self, name):
        raise AttributeError(f"the core read {name!r} of a parameter; the platform's local() and sharding() tell of it")


class StrictTensor:
    """A NumPy array behind the declared operators and attributes."""

    __slots__ = ("_value",)
    __array_ufunc__ = None  # NumPy must not take it for one of its own

    def __init__(self, value):
        self._value = np.asarray(value)

    def __getattr__(self, name):
        raise AttributeError(f"the core used {name!r}, which hyperep.platform.array_subset does not declare")

    def __bool__(self):
        raise TypeError("the core used a tensor as a truth value, which would wait for the device")


def _open(x):
    if isinstance(x, StrictTensor):
        return x._value
    if isinstance(x, StrictDtype):
        return x._dtype
    return type(x)(map(_open, x)) if isinstance(x, list | tuple) else x


def _operator(name):
    def operator(self, *others):
        return StrictTensor(getattr(np.ndarray, name)(self._value, *map(_open, others)))

    return operator


def _getitem(self, key):
    for part in key if isinstance(key, tuple) else (key,):
        forward = isinstance(part, slice) and (part.step is None or part.step > 0)
        assert forward or part is None or part is Ellipsis or isinstance(part, int), f"tensor[{part!r}] is not declared"
    return StrictTensor(self._value[key])


for _name in ARRAY_OPERATORS:
    setattr(StrictTensor, _name, _getitem if _name == "__getitem__" else _operator(_name))
StrictTensor.__hash__ = None
for _name in ARRAY_ATTRIBUTES:
    setattr(StrictTensor, _name, property(lambda self, name=_name: getattr(self._value, name)))
StrictTensor.dtype = property(lambda self: StrictDtype(self._value.dtype))


def _function(name):
    function = getattr(array_namespace, name)

    def strict(*args, **kwargs):
        if name == "argsort":
            assert kwargs.get("stable") is True, "argsort must be stable"
        if name == "take":
            assert kwargs.get("axis") == 0, "take goes along dim 0"
            assert args[1].ndim == 1, "take takes a one-dimensional index"
        return StrictTensor(function(*map(_open, args), **{key: _open(value) for key, value in kwargs.items()}))

    return strict


class StrictPlatform(LoopbackPlatform):
    """Loopback with strict tensors."""

    xp = types.SimpleNamespace(
        **{name: _function(name) for name in ARRAY_FUNCTIONS},
        **{name: getattr(array_namespace, name) for name in ARRAY_DTYPES},
    )

    def is_tensor(self, value):
        return isinstance(value, StrictTensor)

    def from_host(self, array):
        return StrictTensor(np.array(array))

    def to_host(self, *tensors):
        return tuple(np.array(tensor._value) for tensor in tensors)

    def all_to_all_single(self, x, output_splits=None, input_splits=None, group=None, async_op=False):
        return StrictTensor(super().all_to_all_single(_open(x), output_splits, input_splits, group))

    def all_reduce(self, x, group=None, op="sum"):
        return StrictTensor(super().all_reduce(_open(x), group, op))

    def broadcast(self, x, source=0, group=None):
        return StrictTensor(super().broadcast(_open(x), source, group))

    def all_gather(self, x, group=None):
        return StrictTensor(super().all_gather(_open(x), group))

    def custom_vjp(self, forward, backward):
        def call(*inputs):
            # Nothing is recorded here, so backward is run at once, for what it uses and the shapes that it returns.
            outputs, residuals = forward(*inputs)
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            needed = tuple(x.dtype == np.float32 for x in inputs)
            cotangents = tuple(StrictTensor(np.ones(y.shape, _open(y.dtype))) for y in several)
            gradients = backward(residuals, cotangents, needed)
            for x, gradient, wanted in zip(inputs, gradients, needed, strict=True):
                assert gradient is None or not wanted or (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
            return outputs

        return call

    def make_module(self, name, parameters, forward, *, children=None, buffers=None, description=""):
        plain = ({key: _open(value) for key, value in tensors.items()} for tensors in (parameters, buffers or {}))
        parameters, buffers = plain
        module = super().make_module(
            name, parameters, forward, children=children, buffers=buffers, description=description
        )
        for parameter in (*module.own_parameters.values(), *module.own_buffers.values()):
            parameter.bound = StrictTensor(parameter.value)
        return module

    def shard_parameter(self, module, name, local, sharding):
        super().shard_parameter(module, name, _open(local), sharding)
        parameter = (module.own_buffers if name in module.own_buffers else module.own_parameters)[name]
        parameter.bound = StrictTensor(parameter.value)

    def parameters(self, module):
        return {path: self._handle(parameter) for path, parameter in super().parameters(module).items()}

    def buffers(self, module):
        return {path: self._handle(buffer) for path, buffer in super().buffers(module).items()}

    def _handle(self, parameter):
        """The same one each time."""
        known = getattr(parameter, "handle", None)
        if known is None or known._parameter is not parameter:  # a shard takes over the attributes of the whole one
            parameter.handle = StrictHandle(parameter)
        return parameter.handle

    def local(self, parameter):
        return super().local(_known(parameter))

    def sharding(self, parameter):
        return super().sharding(_known(parameter))

    def assign(self, parameter, value):
        super().assign(_known(parameter), _open(value))

    def functional_call(self, module, parameters, function, *inputs, **kwargs):
        handles = {**super().parameters(module), **super().buffers(module)}
        before = {name: handles[name].bound for name in parameters}
        for name, value in parameters.items():
            handles[name].bound = value
        try:
            return function(*inputs, **kwargs)
        finally:
            for name, value in before.items():
                handles[name].bound = value


def _known(parameter):
    return parameter._parameter if isinstance(parameter, StrictHandle) else parameter
