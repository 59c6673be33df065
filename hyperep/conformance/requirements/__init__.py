# SPDX-License-Identifier: Apache-2.0
"""The requirements, one file for each part of the protocol; ``hyperep.conformance.catalogue`` collects them."""
