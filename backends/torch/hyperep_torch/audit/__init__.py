# SPDX-License-Identifier: Apache-2.0
"""Layers of PyTorch for ``hyperep audit``; see ``docs/audit.md``."""

from hyperep_torch.audit.module_subject import ModuleSubject

__all__ = ["ModuleSubject"]
