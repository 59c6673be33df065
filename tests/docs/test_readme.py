# SPDX-License-Identifier: Apache-2.0
"""The README's loopback program, run as written."""

import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parents[2] / "README.md"


def program(name: str) -> str:
    """The Python block of the README that begins with the comment ``# NAME.py``."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [b for b in blocks if b.startswith(f"# {name}.py")]
    return block


def test_loopback_program(tmp_path):
    script = tmp_path / "loopback_moe.py"
    script.write_text(program("loopback_moe"), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "'experts.w1': (2, 128, 64)" in done.stdout
