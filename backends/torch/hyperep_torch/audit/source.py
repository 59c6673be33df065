# SPDX-License-Identifier: Apache-2.0
"""The source of a layer as its author wrote it, without what makes it a subject of the audit."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["folder_of", "name_in_source", "source_without_audit"]

_AUDIT = ("hyperep.audit", "hyperep_torch.audit")


def source_without_audit(function: Callable[..., Any]) -> str | None:
    """The source of *function*'s module, less each statement that has to do with the audit; ``None`` if it has none."""
    module = sys.modules.get(function.__module__)
    try:
        text = inspect.getsource(module) if module is not None else ""
    except OSError:
        text = ""
    if not text or module is None or module.__name__ == "__main__":
        return None
    tree, lines, gone = ast.parse(text), text.splitlines(), set[str]()
    kept = []
    for statement in tree.body:
        if _is_of_audit(statement) or (_names(statement) & gone):
            gone |= set(_bound(statement))
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the module's own text
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            continue
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        kept.append("\n".join(lines[first - 1 : statement.end_lineno]))
    return "\n".join(_spaced(kept))


def name_in_source(function: Callable[..., Any] | None, module: str) -> str | None:
    """How the source of *module* calls *function*; ``None`` if it does not define it."""
    name = getattr(function, "__qualname__", "<object>")  # partial applications and other objects have none
    if function is None or getattr(function, "__module__", None) != module or "<" in name:
        return None
    owner = getattr(function, "__self__", None)  # of a class method, which a class below it may have inherited
    return f"{owner.__qualname__}.{function.__name__}" if isinstance(owner, type) else name


def folder_of(function: Callable[..., Any]) -> str:
    """Where what its module imports may lie beside it."""
    return os.path.dirname(os.path.abspath(inspect.getfile(function)))


def _is_of_audit(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return any(statement.module == name or (statement.module or "").startswith(f"{name}.") for name in _AUDIT)
    return isinstance(statement, ast.Import) and any(alias.name in _AUDIT for alias in statement.names)


def _names(statement: ast.stmt) -> set[str]:
    """Names that a statement needs at once; what a function needs inside counts for it, too."""
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (t.id for target in statement.targets for t in ast.walk(target) if isinstance(t, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def _spaced(parts: list[str]) -> Iterator[str]:
    for part in parts:
        yield ("\n\n" if part.startswith(("class ", "def ", "@")) else "") + part
