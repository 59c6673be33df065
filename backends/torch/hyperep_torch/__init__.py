# SPDX-License-Identifier: Apache-2.0
"""PyTorch platform for hyperep. Importing this package imports no framework; ``hyperep_torch.platform`` does."""
