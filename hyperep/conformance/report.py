# SPDX-License-Identifier: Apache-2.0
"""The report of a run: pure data, written as JSON and read again for the matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperep.conformance.verdict import CONFORMING, Verdict

__all__ = ["SCHEMA", "Report", "Result"]

SCHEMA = 1
"""Version of the JSON's form."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One requirement in one world."""

    id: str
    ranks: int
    verdict: Verdict
    message: str = ""
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run of the suite found."""

    platform: str
    distribution: str
    """Name and version of the plugin's distribution."""
    framework: str
    device: str
    capabilities: Mapping[str, str]
    """Capability -> support, as the platform object declares on this device."""
    suite: str
    """Version of hyperep, whose suite this is."""
    python: str
    machine: str
    world_sizes: tuple[int, ...]
    seed: int
    seconds: float
    results: tuple[Result, ...]

    @property
    def conforms(self) -> bool:
        """Whether every requirement that was run was met, refused as declared, or failed as declared."""
        return all(result.verdict in CONFORMING for result in self.results)

    def count(self, verdict: Verdict) -> int:
        """How many results have that verdict."""
        return sum(result.verdict is verdict for result in self.results)

    def to_json(self) -> str:
        """The report as text that :meth:`from_json` reads: a result a line, so that two reports can be compared."""
        facts = {"schema": SCHEMA, "conforms": self.conforms, **asdict(self)}
        del facts["results"]
        head = json.dumps(facts, indent=1).removesuffix("\n}")
        results = ({k: v for k, v in asdict(r).items() if v != ""} | {"verdict": r.verdict.value} for r in self.results)
        return f'{head},\n "results": [\n' + ",\n".join(f"  {json.dumps(r)}" for r in results) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is no report, or one of another form.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            schema = data.pop("schema")
            data.pop("conforms")
            if schema != SCHEMA:
                raise ValueError(
                    f"a report of form {schema}, but this hyperep reads form {SCHEMA}; run the suite again"
                )
            results = tuple(Result(**{**r, "verdict": Verdict(r["verdict"])}) for r in data.pop("results"))
            return cls(**{**data, "world_sizes": tuple(data["world_sizes"])}, results=results)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a conformance report: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the report to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report from a file; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
