"""Files and directories appear complete or not at all, and keep what was there on a failure."""

import contextlib
import os
from pathlib import Path

import pytest

from llamajax.errors import UserError
from llamajax.files import replaced_directory, replaced_file, undo_new_folders, write_file


def half_written(path):
    path.write_text("half")
    raise ZeroDivisionError


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_the_block_ends_well(tmp_path, monkeypatch, durable):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or sync(number))
    path = tmp_path / ("a long name " * 20)
    write_file(path, "old")
    with pytest.raises(ZeroDivisionError), replaced_file(path) as hidden:
        half_written(hidden)
    assert path.read_text() == "old"
    with replaced_file(path, durable=durable) as hidden:
        hidden.write_bytes(b"new")
        assert path.read_text() == "old"
    assert (os.listdir(tmp_path), path.read_text()) == ([path.name], "new")
    assert len(synced) == durable


def test_a_file_that_cannot_be_written_is_a_user_error_where_it_has_a_label(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_file(tmp_path / "file" / "x", "new")
    with pytest.raises(UserError, match=r"^--json=x cannot be written: Not a directory$"):
        write_file(tmp_path / "file" / "x", "new", label="--json=x")


def test_a_directory_is_replaced_as_a_whole_and_stays_on_any_failure(tmp_path, monkeypatch):
    target = tmp_path / "out"
    for content in ("old", "new"):
        with replaced_directory(target) as hidden:
            (hidden / "in").mkdir()
            (hidden / "in" / "file").write_text(content)
        assert (os.listdir(tmp_path), (target / "in" / "file").read_text()) == (["out"], content)
    rename = Path.rename

    def refuse_the_last(path, to):
        if path.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_the_last)
    message = r"cannot write .*/out: Input/output error"
    with pytest.raises(UserError, match=message), replaced_directory(target) as hidden:
        (hidden / "file").touch()
    assert (os.listdir(tmp_path), (target / "in" / "file").read_text()) == (["out"], "new")


def test_only_new_folders_are_undone(tmp_path):
    with contextlib.ExitStack() as undo:
        undo_new_folders(tmp_path / "a" / "b", undo)
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "kept").touch()
    assert os.listdir(tmp_path / "a") == ["kept"]
