# SPDX-License-Identifier: Apache-2.0
"""``python -m hyperep`` is ``hyperep``."""

from hyperep.cli import main

if __name__ == "__main__":
    main()
