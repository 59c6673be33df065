# SPDX-License-Identifier: Apache-2.0
"""``hyperep bench``: one layer of experts beside what no implementation can beat, and beside the naive way."""
