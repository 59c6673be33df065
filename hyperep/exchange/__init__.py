# SPDX-License-Identifier: Apache-2.0
"""The exchange: how tokens get to the ranks that own their experts, and back."""
