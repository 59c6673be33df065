# SPDX-License-Identifier: Apache-2.0
"""The report of a run: pure data, written as JSON and read again for the matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hyperep.conformance.verdict import CONFORMING, WORST_FIRST, Verdict

__all__ = ["SCHEMA", "WORLD_SIZES", "Report", "Result", "badness", "merged"]

SCHEMA = 2
"""Version of the JSON's form. Form 1 lacks the date, the selection and the number of requirements, and is read too."""
WORLD_SIZES = (1, 2, 3, 4)
"""Numbers of ranks of a whole run."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One requirement in one world."""

    id: str
    ranks: int
    verdict: Verdict
    message: str = ""
    detail: str = ""
    seconds: float = 0.0
    ratio: float | None = None
    """What was measured, where the requirement is one of speed."""


def merged(results: Sequence[Result]) -> list[Result]:
    """One result for each requirement and world of several runs: the worst, and in how many of them it was so."""
    found: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        found.setdefault((result.id, result.ranks), []).append(result)
    return [_worst(several) for several in found.values()]


def badness(result: Result) -> tuple[int, float]:
    """The smaller, the worse: by verdict, and of measurements by what was measured."""
    return WORST_FIRST.index(result.verdict), -(result.ratio or 0.0)


def _worst(results: Sequence[Result]) -> Result:
    worst = min(results, key=badness)
    same = sum(result.verdict is worst.verdict for result in results)
    often = f"in {same} of {len(results)} runs: " if worst.message and same < len(results) else ""
    seconds = round(sum(result.seconds for result in results), 3)
    return replace(worst, message=f"{often}{worst.message}", seconds=seconds)


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
    announced: tuple[str, ...] = ()
    """What the platform uses and a later version of the protocol does not have, a sentence each."""
    remarks: tuple[str, ...] = ()
    """What is no verdict, but should be known, such as ranks that started at another try only."""
    suite: str
    """Version of hyperep, whose suite this is."""
    commit: str = ""
    """The commit that it is of, with ``+`` behind it where files were changed; empty where that cannot be told."""
    requirements: int = 0
    """How many that suite has; 0 in a report that does not tell."""
    selection: tuple[str, ...] | None = None
    """Ids of requirements, or beginnings of them, to which the run was confined; ``None`` for all."""
    date: str = ""
    """When it was made, in UTC; empty in a report that does not tell."""
    python: str
    machine: str
    world_sizes: tuple[int, ...]
    seed: int
    seconds: float
    repeat: int = 1
    """How often each requirement was checked."""
    output: Mapping[str, str] = field(default_factory=dict)
    """What ranks printed, by the name of the rank, if that was asked for."""
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether every requirement that was run was met, refused as declared, or failed as declared."""
        return all(result.verdict in CONFORMING for result in self.results)

    @property
    def conforms(self) -> bool | None:
        """The verdict on the platform; ``None`` after a part of the suite, which is no verdict."""
        return self.passed if self.selection is None else None

    @property
    def ran(self) -> tuple[str, ...]:
        """Ids of the requirements that were run, those included that others need."""
        return tuple(dict.fromkeys(result.id for result in self.results))

    @property
    def asked(self) -> tuple[str, ...]:
        """Ids of those that were asked for."""
        if self.selection is None:
            return self.ran
        exact = set(self.selection) & set(self.ran)
        beginnings = tuple(entry for entry in self.selection if entry not in exact)
        return tuple(id for id in self.ran if id in exact or id.startswith(beginnings))

    @property
    def sizes_not_run(self) -> tuple[int, ...]:
        """World sizes of a whole run that this one left out."""
        return tuple(size for size in WORLD_SIZES if size not in self.world_sizes)

    def count(self, verdict: Verdict) -> int:
        """How many results have that verdict."""
        return sum(result.verdict is verdict for result in self.results)

    def to_json(self) -> str:
        """The report as text that :meth:`from_json` reads: a result a line, so that two reports can be compared."""
        facts = {"schema": SCHEMA, "conforms": self.conforms, **asdict(self)}
        del facts["results"]
        head = json.dumps(facts, indent=1).removesuffix("\n}")
        results = (
            {k: v for k, v in asdict(r).items() if v not in ("", None)} | {"verdict": r.verdict.value}
            for r in self.results
        )
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
            if schema not in range(1, SCHEMA + 1):
                raise ValueError(
                    f"a report of form {schema}, but this hyperep reads forms 1 to {SCHEMA}; run the suite again"
                )
            results = tuple(Result(**{**r, "verdict": Verdict(r["verdict"])}) for r in data.pop("results"))
            selection = data.pop("selection", None)
            data["world_sizes"] = tuple(data["world_sizes"])
            data |= {key: tuple(data.get(key, ())) for key in ("announced", "remarks")}
            return cls(**data, selection=None if selection is None else tuple(selection), results=results)
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
