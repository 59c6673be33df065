# SPDX-License-Identifier: Apache-2.0
"""What the design page says about the code is true of the code."""

import re
from pathlib import Path

from hyperep.exchange import row_input, token_input
from hyperep.platform.protocol import Platform

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
MEMBERS = {name for name in vars(Platform) if not name.startswith("_")}


def test_number_of_members():
    assert f"| {len(MEMBERS)} members |" in PAGE


def test_members_with_a_hand_written_backward_exist():
    (table,) = re.findall(r"^\| member \| forward \| backward \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.M)
    named = re.findall(r"^\| `(\w+)`", table, flags=re.M)
    assert len(named) > 5
    assert set(named) <= MEMBERS


def test_files_exist():
    named = set(re.findall(r"\bhyperep/[\w/]+\.py\b", PAGE))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_size_of_the_header():
    assert f"R·(L + {row_input.HEADER}) integers" in PAGE
    assert f"R·{token_input.HEADER} integers" in PAGE
    assert f"{8 * token_input.HEADER} bytes a peer" in PAGE
