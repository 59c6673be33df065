# SPDX-License-Identifier: Apache-2.0
"""Reading text, and cutting batches from it."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from hyperep.train.batches import global_batch, own_part
from hyperep.train.text import load_text


def test_the_default_is_the_source_of_the_standard_library():
    text = load_text(None)
    content = text.tokens.tobytes()
    assert b"class OrderedDict" in content
    assert text.files > 100
    assert b"import numpy" not in content  # not what is installed beside it


def test_a_directory_is_read_in_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "picture").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    text = load_text(str(tmp_path))
    assert (text.tokens.tobytes(), text.files) == (b"one\ntwo", 2)


def test_a_text_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist; --text takes a file or a directory"):
        load_text(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("inside", [True, False])
def test_a_fifo_is_an_error_and_no_wait_for_ever(tmp_path, inside):
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path if inside else tmp_path / "pipe"
    with pytest.raises(ValueError, match=rf"text '{path}': .*pipe is no regular file .* with --text"):
        load_text(str(path))


def test_a_socket_and_an_endless_device_are_no_text(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match="is no regular file"):
            load_text(str(tmp_path))
    with pytest.raises(ValueError, match="/dev/zero is no regular file"):
        load_text("/dev/zero")


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"link cannot be read \(No such file or directory\)"):
        load_text(str(tmp_path))


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch, what):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b" / "two.txt").write_text("two")
    if os.geteuid():
        (tmp_path / "b" if what == "folder" else tmp_path / "a.txt").chmod(0)
    else:  # root may read everything

        def forbid(name, real):
            def call(path, *arguments):
                if str(path) == str(name):
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *arguments)

            return call

        if what == "folder":
            monkeypatch.setattr(os, "scandir", forbid(tmp_path / "b", os.scandir))
        else:
            monkeypatch.setattr(Path, "read_bytes", forbid(tmp_path / "a.txt", Path.read_bytes))
    name = "b" if what == "folder" else "a.txt"
    with pytest.raises(
        OSError, match=rf"{name} cannot be read \(Permission denied\); mend that, or name another --text"
    ):
        load_text(str(tmp_path))


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_empty_text(tmp_path, kind):
    path = tmp_path / "nothing"
    path.touch() if kind == "file" else path.mkdir()
    with pytest.raises(ValueError, match=r"nothing' is empty: no byte of text in \d files; .* --text"):
        load_text(str(path))


def test_a_text_shorter_than_a_sequence(tmp_path):
    path = tmp_path / "short"
    path.write_text("x" * 16)
    with pytest.raises(ValueError, match=r"short' has 16 bytes, .* need 17; .* or choose a smaller --seq-len"):
        load_text(str(path), at_least=17)
    path.write_text("x" * 17)
    assert len(load_text(str(path), at_least=17).tokens) == 17


def test_batches_are_pieces_of_the_text_and_depend_on_seed_and_step_alone():
    tokens = np.arange(200, dtype=np.uint8)

    def cut(**changes):
        return global_batch(tokens, **{"seed": 1, "step": 2, "sequences": 50, "seq_len": 10, **changes})

    batch = cut()
    assert batch.shape == (50, 11)
    assert (np.diff(batch, axis=1) == 1).all()
    np.testing.assert_array_equal(batch, cut())
    assert (batch != cut(step=3)).any()
    assert (batch != cut(seed=2)).any()


def test_the_last_byte_can_be_predicted():
    batch = global_batch(np.arange(12, dtype=np.uint8), seed=0, step=0, sequences=200, seq_len=10)
    assert set(batch[:, 0]) == {0, 1}


def test_ranks_take_all_sequences_once():
    batch = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(np.concatenate([own_part(batch, r, 3) for r in range(3)]), batch)
