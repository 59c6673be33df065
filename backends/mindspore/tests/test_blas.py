# SPDX-License-Identifier: Apache-2.0
"""Kernels of NumPy's products: which ones are better, and who is told."""

from __future__ import annotations

import os
import platform as machine
import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl
from hyperep_mindspore import blas, launcher

WIDE = ["AVX2", "AVX512F", "AVX512_SKX", "FMA3"]


@pytest.mark.parametrize(
    ("chosen", "features", "better"),
    [
        (["Prescott"], WIDE, "SkylakeX"),
        (["SkylakeX", "Prescott"], WIDE, "SkylakeX"),  # SciPy has a copy of its own
        (["Prescott"], ["AVX", "AVX2", "FMA3"], "Haswell"),
        (["Prescott"], ["AVX", "AVX2"], None),
        (["Prescott"], ["SSE3"], None),
        (["Haswell"], WIDE, None),
        (["Zen"], WIDE, None),
        ([], WIDE, None),
    ],
)
def test_only_the_oldest_kernels_are_replaced_and_by_ones_that_the_processor_can_run(chosen, features, better):
    assert blas.kernels_for(chosen, features) == better


def test_launched_ranks_get_better_kernels_and_a_choice_of_the_user_s_stays(monkeypatch):
    old = [{"architecture": "Prescott"}]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: old)
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"found": WIDE}})
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    for ranks in (1, 2):
        plan = launcher.launcher.plan(ranks)
        assert [process.environment[blas.VARIABLE] for process in plan.processes] == ["SkylakeX"] * ranks
    with pytest.warns(RuntimeWarning, match="OPENBLAS_CORETYPE=SkylakeX"):
        blas.warn_of_slow_kernels()
    monkeypatch.setenv(blas.VARIABLE, "Haswell")
    assert blas.VARIABLE not in launcher.launcher.plan(2).processes[0].environment


def test_a_processor_with_nothing_beyond_the_baseline_is_left_alone(monkeypatch):
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [{"architecture": "Prescott"}])
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"baseline": ["SSE", "SSE2", "SSE3"]}})
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    assert blas.better_kernels() is None


@pytest.mark.skipif(machine.machine() != "x86_64", reason="the names of kernels are those of x86-64")
def test_openblas_listens_to_the_variable_and_threadpoolctl_tells():
    """What the rest takes for granted of NumPy's wheel."""
    program = "import numpy, threadpoolctl as t; print([x['architecture'] for x in t.threadpool_info()])"
    environment = {**os.environ, blas.VARIABLE: "Haswell"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['Haswell']"
