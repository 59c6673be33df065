# SPDX-License-Identifier: Apache-2.0
"""Starting a world of ranks."""

from hyperep.launch.launcher import Launcher
from hyperep.launch.plan import Auxiliary, LaunchPlan, RankProcess
from hyperep.launch.run import run_on_ranks
from hyperep.launch.steps import step_done

__all__ = ["Auxiliary", "LaunchPlan", "Launcher", "RankProcess", "run_on_ranks", "step_done"]
