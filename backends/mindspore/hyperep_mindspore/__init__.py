# SPDX-License-Identifier: Apache-2.0
"""MindSpore platform for hyperep. Importing this package imports no framework; ``hyperep_mindspore.platform`` does."""
