# SPDX-License-Identifier: Apache-2.0
"""Run a command on emulated devices.

python -m ascend_emulator run [--devices N] [--delay-ms N] -- COMMAND ...
python -m ascend_emulator build    builds the libraries and prints their folder
"""

import argparse
import os

from ascend_emulator.build import build
from ascend_emulator.environment import environment


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m ascend_emulator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the libraries and print their folder")
    run = commands.add_parser("run", help="run a command on emulated devices")
    run.add_argument("--devices", type=int, default=8, help="how many devices there are (8)")
    run.add_argument("--delay-ms", type=int, default=0, help="delay of each asynchronous copy and collective (0)")
    run.add_argument("program", nargs=argparse.REMAINDER, help="-- and the command")
    given = parser.parse_args()
    if given.command == "build":
        print(build())
        return
    program = given.program[1:] if given.program[:1] == ["--"] else given.program
    if not program:
        parser.error("no command; example: python -m ascend_emulator run -- python program.py")
    os.execvpe(program[0], program, environment(given.devices, delay_ms=given.delay_ms))


if __name__ == "__main__":
    main()
