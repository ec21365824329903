"""A file is whole or not there, and a folder that cannot be written is said at once."""

import os

import pytest

from safedig.config import UsageError
from safedig.storage import check_writable, write_atomically


def test_a_file_and_the_folders_on_its_way_appear(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file", b"whole")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"whole"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(source, target):
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new", "control: the disk has room again"


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "new" / "folder", "--out")
    assert not [*(tmp_path / "new" / "folder").iterdir()]


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^--out .*file/folder cannot be written \(.+\): give a folder that can\.$"):
        check_writable(tmp_path / "file" / "folder", "--out")
