# SPDX-License-Identifier: Apache-2.0
"""The README's PyTorch program, run as written, under torchrun."""

import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parents[3] / "README.md"


def test_program_under_torchrun(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (program,) = [block for block in blocks if block.startswith("# train_moe.py")]
    script = tmp_path / "train_moe.py"
    script.write_text(program, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines() if "(4, 128, 64)" in line]
    losses = [float(words[-1]) for words in steps]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2
