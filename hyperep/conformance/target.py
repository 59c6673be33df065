# SPDX-License-Identifier: Apache-2.0
"""``Target``: the platform under test, as far as the suite needs to know it before any rank runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hyperep.launch import Launcher, LaunchPlan, RankProcess
from hyperep.platform.candidate import Candidate, State
from hyperep.platform.capabilities import complete
from hyperep.platform.reference import resolve
from hyperep.platform.registry import default_registry
from hyperep.platform.removals import used_by_spec

__all__ = ["Target", "find_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A platform to check."""

    name: str
    launcher: Launcher
    declared: Mapping[str, str]
    """Capability -> support, as the spec declares."""
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    distribution: str = ""
    framework: str = ""
    announced: tuple[str, ...] = ()
    """What its spec uses and a later version of the protocol does not have, a sentence each."""

    def expects_failure(self, requirement: str, ranks: int) -> str | None:
        """The plugin's reason why it fails *requirement* (``"ID"``, or ``"ID@4"`` for one world size)."""
        return self.expected_failures.get(f"{requirement}@{ranks}", self.expected_failures.get(requirement))


def find_target(name: str) -> Target:
    """The installed platform of that name.

    Raises:
        PlatformError: there is none, or it cannot be used here.
        ValueError: it names no launcher that could start ranks.
    """
    candidate = _viable(name)
    spec = candidate.spec
    assert spec is not None, "a viable candidate has a spec"
    launcher = resolve(spec.launcher) if spec.launcher else _OneRank()
    if not isinstance(launcher, Launcher):
        raise ValueError(f"launcher {spec.launcher!r} of platform {name!r} is {launcher!r}; it must be a Launcher")
    versions = [f"{n} {v}".strip() for n, v in zip(candidate.distributions, candidate.versions, strict=True)]
    return Target(
        name=name,
        launcher=launcher,
        declared={c.value: s.value for c, s in complete(spec.capabilities).items()},
        expected_failures=dict(spec.expected_failures),
        distribution=", ".join(versions),
        framework=candidate.viability.framework if candidate.viability else "",
        announced=tuple(removal.announce(name) for removal in used_by_spec(spec)),
    )


def _viable(name: str) -> Candidate:
    registry = default_registry()
    candidate = registry.candidate(name)
    if candidate.state is not State.VIABLE:
        raise candidate.error()
    return candidate


class _OneRank(Launcher):
    """For a platform without a launcher: its world is always one rank."""

    def joined(self) -> bool:
        return False

    def plan(self, ranks: int) -> LaunchPlan:
        if ranks != 1:
            raise ValueError(
                f"{ranks} ranks were asked for, but the platform's spec names no launcher: only 1 can be run"
            )
        return LaunchPlan(processes=(RankProcess(ranks=(0,)),))
