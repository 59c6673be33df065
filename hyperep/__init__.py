# SPDX-License-Identifier: Apache-2.0
"""hyperep: expert parallelism that is written once and runs on every platform."""
