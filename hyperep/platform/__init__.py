# SPDX-License-Identifier: Apache-2.0
"""What the core asks of a framework, and how a framework is found."""
