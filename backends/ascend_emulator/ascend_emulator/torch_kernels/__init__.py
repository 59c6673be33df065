# SPDX-License-Identifier: Apache-2.0
"""Kernels of the emulated device for PyTorch: those of the CPU, over the same bytes. Imported after torch_npu."""
