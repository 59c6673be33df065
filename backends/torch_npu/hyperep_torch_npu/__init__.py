# SPDX-License-Identifier: Apache-2.0
"""PyTorch on Ascend for hyperep. Importing this package imports no framework; ``hyperep_torch_npu.platform`` does."""
