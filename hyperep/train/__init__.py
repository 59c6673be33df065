# SPDX-License-Identifier: Apache-2.0
"""``hyperep train``: a small byte-level language model with a mixture of experts, written against the core alone."""
