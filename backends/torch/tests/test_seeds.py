# SPDX-License-Identifier: Apache-2.0
"""Initial weights on torch: the core's neutral cases."""

import sys
from pathlib import Path

from hyperep_torch.platform import join

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "neutral"))
import seed_cases


def test_modules_differ_by_default(platform):
    seed_cases.modules_differ_by_default(platform)


def test_a_model_is_the_same_as_on_loopback():
    seed_cases.a_model_is_the_same_here_as_on_loopback(join(device="cpu"))


def test_a_model_is_the_same_on_all_ranks(two):
    two.run(_joined_anew)


def _joined_anew(platform):
    del platform  # the ranks' own one has made modules for other tests
    seed_cases.a_model_is_the_same_here_as_on_loopback(join(device="cpu"))
