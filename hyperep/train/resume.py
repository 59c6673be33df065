# SPDX-License-Identifier: Apache-2.0
"""The settings of a run from those that were given, and from the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hyperep.train.checkpoint import read_manifest
from hyperep.train.settings import MODEL_FIELDS, Settings

__all__ = ["settings_for"]


def settings_for(given: Mapping[str, Any], resume: str | None) -> Settings:
    """The default settings, or with *resume* those of that checkpoint, changed by the *given* ones.

    Raises:
        FileNotFoundError: *resume* holds no checkpoint.
        ValueError: a given setting changes the model's shape, or the checkpoint is at the last step already.
    """
    if resume is None:
        return Settings(**given)
    manifest = read_manifest(resume)
    for name in MODEL_FIELDS:
        stored = getattr(manifest.settings, name)
        if given.get(name, stored) != stored:
            raise ValueError(
                f"{name}={given[name]}, but the checkpoint in {manifest.directory} was trained with {stored}; leave "
                f"the option out, or begin a new run"
            )
    # A run that was moved goes on where it is now; whether to verify, or to overwrite, is asked anew each time.
    base = replace(manifest.settings, out=str(manifest.directory.parent), verify=False, overwrite=False)
    settings = replace(base, **given, resume=resume)
    if settings.steps <= manifest.step:
        raise ValueError(
            f"steps={settings.steps}, but the checkpoint in {manifest.directory} is at step {manifest.step} already; "
            f"give --steps above {manifest.step}"
        )
    return settings
