# SPDX-License-Identifier: Apache-2.0
"""Bad input to an exchange, made known to every rank.

An error raised on one rank only leaves its peers waiting in the next collective. So each rank puts a header of a few
integers into the small message that an exchange begins with, and after the one host copy every rank reads all headers
and raises the same error. How long a message is must not depend on what may be wrong: a rank that is mistaken about
that would read past the message of another, or end the process.

A kind of exchange says once, in a :class:`Check`, what can be wrong with its input. Each call then writes what this
rank has to say (:class:`Said`) with :meth:`Check.message`, and reads what all say with :meth:`Check.raise_any`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperep.mesh import DeviceMesh
from hyperep.platform.dtypes import dtype_named
from hyperep.platform.protocol import Platform

__all__ = ["Check", "Common", "Said", "dtype_bytes", "dtype_name", "dtype_number", "is_floating", "kind_of"]

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_DTYPES = (*_FLOATING, "int32", "int64", "bool")
"""Dtypes that ranks tell each other by number; a platform may lack some."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one rank says of its own input, in integers that the host knows."""

    fault: int = 0
    """A code of :attr:`Check.faults`; zero is no fault."""
    values: tuple[int, int] = (0, 0)
    """Of the fault, for its text; without a fault, what :attr:`Check.judge` wants to know."""
    common: tuple[int, ...]
    """What must be the same on all ranks, as :attr:`Check.common` describes it."""
    detail: str = ""
    """What only this rank can say, such as the name of a type."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Something that must be the same on all ranks."""

    what: str
    describe: Callable[..., str]
    """From its integers to words."""
    rule: str
    size: int = 1
    """Number of its integers."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What can be wrong with the input of one kind of exchange, and in which words ranks hear of it.

    A header is ``[fault, two values, what must be common, what was measured]``, int64.
    """

    call: str
    """Which call it is, as the errors name it."""
    faults: Mapping[int, tuple[type[Exception], str]]
    """By code: the error, and its text with ``{0}``, ``{1}`` for values, ``{platform}``, ``{device}``, ``{mesh}``."""
    common: tuple[Common, ...] = ()
    measured: int = 0
    """How many values a rank measures on its device, so that the host need not wait for them."""
    judge: Callable[[Sequence[int], Sequence[int]], tuple[type[Exception], str] | None] = lambda values, measured: None
    """The error that a faultless rank's values and measured values amount to, if they do."""

    @property
    def header(self) -> int:
        """Integers of a header."""
        return 3 + sum(common.size for common in self.common) + self.measured

    def message(
        self,
        platform: Platform[Any],
        ranks: int,
        room: int,
        said: Said,
        payload: Sequence[Any] = (),
        measured: Any = None,
    ) -> Any:
        """What this rank sends: int64 ``[R, room + header]``, for each rank its part of *payload*, then the header.

        Args:
            platform: the platform of the tensors.
            ranks: ``R``.
            room: integers for the payload, the same on all ranks; what is not used is zero.
            said: the header's words.
            payload: int64 tensors ``[R, P]``, together no wider than *room*; left out if there is a fault.
            measured: int64 tensor of the measured values.
        """
        known = (said.fault, *said.values, *said.common)
        if not payload:
            host = np.zeros((ranks, room + self.header), dtype=np.int64)
            host[:, room : room + len(known)] = known
            return platform.from_host(host)
        xp = platform.xp
        parts = list(payload)
        left = room - sum(part.shape[1] for part in payload)
        if left:
            parts.append(xp.zeros((ranks, left), dtype=xp.int64))
        parts.append(platform.from_host(np.array([known] * ranks, dtype=np.int64)))
        if measured is not None:
            parts.append(xp.broadcast_to(measured, (ranks, self.measured)))
        return xp.concat(parts, axis=1)

    def raise_any(self, mesh: DeviceMesh, received: np.ndarray, own: Said) -> None:
        """Raise the error of the first rank of the mesh that is at fault; the same on all ranks.

        Args:
            mesh: 1-D mesh of the exchange.
            received: the messages of all its ranks on the host, ``[R, room + header]``.
            own: what this rank said.
        """
        headers = received[:, -self.header :].tolist()
        for rank, header in zip(mesh.ranks.tolist(), headers, strict=True):
            found = self._error(header, mesh)
            if found is not None:
                error, text = found
                detail = f" ({own.detail})" if own.detail and rank == mesh.platform.rank else ""
                raise error(f"{self.call} on rank {rank}: {text}{detail}")
        start = 3
        for common in self.common:
            said = [tuple(header[start : start + common.size]) for header in headers]
            start += common.size
            other = next((position for position, values in enumerate(said) if values != said[0]), None)
            if other is not None:
                raise ValueError(
                    f"{self.call} on rank {int(mesh.ranks[other])}: {common.what} is {common.describe(*said[other])}, "
                    f"but on rank {int(mesh.ranks[0])} it is {common.describe(*said[0])}; {common.rule}"
                )

    def _error(self, header: Sequence[int], mesh: DeviceMesh) -> tuple[type[Exception], str] | None:
        fault, values, measured = header[0], header[1:3], header[len(header) - self.measured :]
        if not fault:
            return self.judge(values, measured)
        error, text = self.faults[fault]
        return error, text.format(*values, platform=mesh.platform.name, device=mesh.platform.device, mesh=mesh)


def dtype_number(xp: Any, dtype: Any) -> int:
    """A number by which ranks tell each other a dtype; different for different dtypes."""
    name = dtype_named(xp, dtype, _DTYPES)
    return -1 - zlib.crc32(str(dtype).encode()) if name is None else _DTYPES.index(name)


def is_floating(number: int) -> bool:
    """Whether that is the number of a floating dtype."""
    return 0 <= number < len(_FLOATING)


def dtype_bytes(dtype: Any) -> int:
    """Size of a number of a dtype, from its name.

    Raises:
        ValueError: the name does not tell it.
    """
    bits = re.search(r"\d+", str(dtype))
    if bits is None:
        raise ValueError(f"the dtype {dtype} does not name its size")
    return int(bits.group()) // 8


def dtype_name(number: int) -> str:
    """The dtype of that number, for people to read."""
    return _DTYPES[number] if number >= 0 else f"another dtype (number {number})"


def kind_of(value: Any) -> str:
    """What *value* is, for an error that says that it is no tensor: its type, and where and how it is stored."""
    told = (f" on {value.device}" if hasattr(value, "device") else "", str(getattr(value, "layout", "")))
    return f"{type(value).__module__}.{type(value).__qualname__}{told[0]}" + (f", {told[1]}" if told[1] else "")
