# SPDX-License-Identifier: Apache-2.0
"""JAX as a platform of hyperep."""
