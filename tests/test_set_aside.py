# SPDX-License-Identifier: Apache-2.0
"""What libraries print is kept apart, also what native code prints."""

import os

import pytest

from hyperep.cli.set_aside import set_aside


def test_all_that_is_printed_inside_is_kept_and_not_shown(capfd):
    print("before")
    with set_aside() as said:
        print("python")
        os.write(1, b"native\n")
        os.write(2, b"errors\n")
    print("after")
    assert said() == "python\nnative\nerrors\n"
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_it_is_shown_after_all_where_something_fails(capfd):
    def fail():
        with set_aside():
            os.write(1, b"the reason\n")
            raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        fail()
    assert capfd.readouterr() == ("", "the reason\n")
