# SPDX-License-Identifier: Apache-2.0
"""The command line: ``hyperep COMMAND``. Each command is a file here, imported only when it is the one that runs."""

from hyperep.cli.application import main

__all__ = ["main"]
