"""Files are whole or as they were."""

import errno
import os
import tempfile

import pytest

from sagan_kernels.files import write_atomically, write_together


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(text):
    """A writer that gets half of its text onto the disk."""

    def write(path):
        path.write_text(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


def test_write_makes_folders_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("old", "new"):
        assert write_atomically(path, lambda temporary, text=text: temporary.write_text(text)) == path
        assert path.read_text() == text
    assert names(path.parent) == ["b.txt"]


def test_full_disk_leaves_the_old_file_whole_and_no_rest(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(OSError, match=r"b\.txt: could not be written, No space left on device; the old file"):
        write_atomically(path, full_disk("new text"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


def test_files_that_belong_together_change_together(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: lambda t: t.write_text("1"), second: lambda t: t.write_text("2")})
    with pytest.raises(OSError, match="second: could not be written"):
        write_together({first: lambda t: t.write_text("one"), second: full_disk("two")})
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert names(tmp_path) == ["first", "second"]


def test_an_error_of_another_kind_leaves_no_rest_either(tmp_path):
    def write(path):
        path.write_text("half")
        raise KeyError("x")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "b.txt", write)
    assert names(tmp_path) == []


def test_no_permission_is_named_with_the_path(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(OSError, match=r"b\.txt: could not be written, Permission denied") as caught:
        write_atomically(tmp_path / "b.txt", lambda temporary: temporary.write_text("new"))
    assert caught.value.errno == errno.EACCES


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "a").write_text("file")
    with pytest.raises(OSError, match="could not be written"):
        write_atomically(tmp_path / "a" / "b.txt", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "a").read_text() == "file"


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "b.txt", lambda temporary: temporary.write_text("new"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
