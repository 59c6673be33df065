# SPDX-License-Identifier: Apache-2.0
"""Makes the mutants importable, here and in the rank processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
