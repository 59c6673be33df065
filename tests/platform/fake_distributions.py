# SPDX-License-Identifier: Apache-2.0
"""Fake distributions: real metadata and a real module, in a folder that is put on ``sys.path``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

PLATFORM_MODULE = """
    from hyperep.platform.capabilities import Capability, Support
    from hyperep.platform.hookspecs import hookimpl
    from hyperep.platform.spec import PlatformSpec, Viability

    {before}

    class FakePlatform:
        name = "{name}"
        def __init__(self, **options):
            self.options = options
        def adopt_mesh(self, mesh):
            return None

    def make(device="cpu"):
        return FakePlatform(device=device)

    def probe():
        {probe}

    @hookimpl
    def hyperep_platform_spec():
        {hook}
        return PlatformSpec(
            name="{spec_name}", api={api}, factory="{factory}", probe="{module}:probe",
            priority={priority}, install_hint="pip install {distribution}",
            capabilities={{Capability.ALL_TO_ALL: Support.FULL, Capability.FLOAT64: Support.EMULATED}},
        )
"""


@dataclass(frozen=True)
class Site:
    """A folder on ``sys.path`` that fake distributions are installed in."""

    folder: Path

    def install(
        self,
        name: str,
        *,
        distribution: str = "",
        version: str = "1.0",
        probe: str = 'return Viability.yes("found")',
        before: str = "",
        hook: str = "",
        priority: int = 0,
        api: object = (2, 2),
        spec_name: str = "",
        factory: str = "",
        source: str | None = None,
        metadata: bool = True,
    ) -> str:
        """Install a distribution that registers a platform *name*; return the name of its module.

        The keywords replace parts of a plugin that works: *before* runs at import, *hook* and *probe* in the functions
        of those names, and *source* is a whole module instead.
        """
        distribution = distribution or f"hyperep-{name}"
        module = distribution.replace("-", "_")
        if source is None:
            source = textwrap.dedent(PLATFORM_MODULE).format(
                name=name,
                module=module,
                distribution=distribution,
                probe=probe,
                before=before,
                hook=hook,
                priority=priority,
                api=api,
                spec_name=spec_name or name,
                factory=factory or f"{module}:make",
            )
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[hyperep.platforms]\n{name} = {module}\n")
        return module
