"""A file is replaced as a whole or not at all, and nothing else is left in its folder."""

import numpy as np
import pytest

from clip_jax.storage import atomic


def test_text_and_bytes_replace_the_file_and_leave_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    atomic.write_text(file, "café\n")
    assert file.read_bytes() == "café\n".encode()
    atomic.write_bytes(file, b"\0\r\n")
    assert file.read_bytes() == b"\0\r\n"
    assert list(tmp_path.iterdir()) == [file]


def test_the_temporary_name_has_the_suffix_that_a_writer_may_depend_on(tmp_path):
    with atomic.replacing(tmp_path / "a.npz") as temporary:
        np.savez(temporary, x=np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ValueError, match="interrupted"), atomic.replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        assert (tmp_path / "a.txt").read_text() == "old"
        raise ValueError("interrupted")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
