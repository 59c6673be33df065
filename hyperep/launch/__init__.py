# SPDX-License-Identifier: Apache-2.0
"""Starting a world of ranks."""

from hyperep.launch.launcher import Auxiliary, Launcher, LaunchPlan, RankProcess

__all__ = ["Auxiliary", "LaunchPlan", "Launcher", "RankProcess"]
