# SPDX-License-Identifier: Apache-2.0
"""The Python package of CANN that MindSpore looks for before it sets up communication, and asks for its version."""


class sys_version:  # noqa: N801 (its name in CANN)
    """The version of CANN that the emulated device stands in for."""

    __sys_version__ = "9.1"
