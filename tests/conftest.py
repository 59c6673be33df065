# SPDX-License-Identifier: Apache-2.0
"""Makes the neutral cases importable; tests of platforms run the same ones."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "neutral"))
