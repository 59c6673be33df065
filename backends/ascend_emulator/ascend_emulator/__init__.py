# SPDX-License-Identifier: Apache-2.0
"""An emulated Ascend device: the unmodified torch_npu wheel, running on a CPU.

Test equipment, never installed: put the folder above this one on PYTHONPATH. `ascend_emulator.environment()` gives the
environment in which a Python program, and every process that it starts, finds emulated devices;
`python -m ascend_emulator run -- python program.py` starts one. See README.md in the folder above.
"""

from ascend_emulator.environment import environment

__all__ = ["environment"]
