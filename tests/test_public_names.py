# SPDX-License-Identifier: Apache-2.0
"""The names that others write programs against."""

import importlib
import pkgutil

import hyperep


def test_public_names_are_what_they_say_after_everything_was_imported():
    """A submodule of the same name would take the place of a function once it is imported."""
    for module in pkgutil.iter_modules(hyperep.__path__):
        assert module.name not in hyperep.__all__
    importlib.import_module("hyperep.styles")
    for name in hyperep.__all__:
        assert callable(getattr(hyperep, name)), name
    assert sorted(hyperep.__all__) == sorted(hyperep._HOME)
