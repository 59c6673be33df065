# SPDX-License-Identifier: Apache-2.0
"""Serve aten kernels in every process that imports torch_npu in the environment of ascend_emulator.

Python imports `sitecustomize` at its start. Importing torch_npu here would make every Python process slow, so this only
installs a finder that waits for that import. Another sitecustomize that this one hides is run too.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class KernelsAfterTorchNpu:
    """A meta path finder that lets torch_npu be found as usual, and has its kernels served once it is imported."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find torch_npu as usual, with a loader that serves the kernels. Others may look and not load."""
        if name != "torch_npu":
            return None
        spec = PathFinder.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_serve(module: ModuleType) -> None:
                run(module)
                from ascend_emulator.torch_kernels.aten import serve

                serve()

            spec.loader.exec_module = run_and_serve  # type: ignore[method-assign]
        return spec


def _run_hidden_sitecustomize() -> None:
    here = Path(__file__).parent
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry or ".") != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, KernelsAfterTorchNpu())
_run_hidden_sitecustomize()
