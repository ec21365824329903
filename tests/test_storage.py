"""A file is whole or not there, and a folder that cannot be written is said at once."""

import os

import pytest
import torch

from safedig.config import UsageError
from safedig.storage import Format, check_writable, part, write_atomically


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


KIND = Format("thing", 3, "thing, as it was written", "Write it again.")


def test_a_folder_gives_back_what_was_written_and_its_parts_by_their_own_names(tmp_path):
    tensors = {"a/x": torch.arange(3.0), "a/y.z": torch.ones(2, 2).t(), "ab/x": torch.zeros(1)}
    KIND.write(tmp_path / "new", {"name": "n"}, tensors)
    facts, found = KIND.read(tmp_path / "new")
    assert facts == {"format": 3, "name": "n"} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert part(found, "a").keys() == {"x", "y.z"} and part(found, "b") == {}


@pytest.mark.parametrize("facts", ["[]", "null", "3", "[" * 10**5])
def test_facts_that_are_no_object_are_refused_by_name(tmp_path, facts):
    KIND.write(tmp_path, {}, {"x": torch.arange(3.0)})
    assert KIND.read(tmp_path)[0] == {"format": 3}, "control: as it was written"
    (tmp_path / "thing.json").write_text(facts)
    with pytest.raises(UsageError, match="is no thing, as it was written"):
        KIND.read(tmp_path)


@pytest.mark.parametrize("harm", ["no facts", "no tensors", "torn facts", "torn tensors", "another version"])
def test_a_folder_that_is_torn_or_of_another_version_is_refused_by_name(tmp_path, harm):
    KIND.write(tmp_path, {}, {"x": torch.arange(3.0)})
    facts, tensors = tmp_path / "thing.json", tmp_path / "thing.safetensors"
    if harm.startswith("no "):
        {"no facts": facts, "no tensors": tensors}[harm].unlink()
    elif harm.startswith("torn "):
        torn = {"torn facts": facts, "torn tensors": tensors}[harm]
        torn.write_bytes(torn.read_bytes()[:-3])
    else:
        facts.write_text('{"format": 2}')
    expected = "has format 2; this version reads format 3" if harm == "another version" else "is no thing, as it was"
    with pytest.raises(UsageError, match=expected):
        KIND.read(tmp_path)
