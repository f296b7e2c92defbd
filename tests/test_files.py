"""Files and directories appear complete or not at all; locks are held, given up, or not there."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused

from llamajax import files
from llamajax.errors import TransientError, UserError
from llamajax.files import (
    lock_file,
    replaced_directory,
    replaced_file,
    undo_new_folders,
    write_file,
)
from llamajax.training.workdir import lock_workdir


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


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_directory_is_replaced_as_a_whole_and_stays_on_any_failure(tmp_path, monkeypatch, error):
    target = tmp_path / "out"
    (tmp_path / ".out.partial" / "in").mkdir(parents=True)  # of a killed process
    for content in ("old", "new"):
        with replaced_directory(target) as hidden:
            (hidden / "in").mkdir()
            (hidden / "in" / "file").write_text(content)
        assert (os.listdir(tmp_path), (target / "in" / "file").read_text()) == (["out"], content)
    rename = Path.rename

    def refuse_the_last(path, to):
        if path.name == ".out.partial":
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse_the_last)
    stopped = pytest.raises(KeyboardInterrupt)
    expected = refused("/out: Input/output error") if isinstance(error, OSError) else stopped
    with expected, replaced_directory(target) as hidden:
        (hidden / "file").touch()
    assert (os.listdir(tmp_path), (target / "in" / "file").read_text()) == (["out"], "new")


def test_only_new_folders_are_undone(tmp_path):
    with contextlib.ExitStack() as undo:
        undo_new_folders(tmp_path / "a" / "b", undo)
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "kept").touch()
    assert os.listdir(tmp_path / "a") == ["kept"]


@pytest.fixture
def held(tmp_path: Path):
    """The lock of a run in `tmp_path`, held as if by another process."""
    with (tmp_path / ".lock_0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@pytest.fixture
def sleeps(monkeypatch):
    """What is done while it waits, instead of sleeping: may be set."""
    todo = {"then": lambda: None}
    monkeypatch.setattr(files.time, "sleep", lambda _: todo["then"]())
    return todo


def test_a_lock_that_a_dying_process_gives_up_is_waited_for(tmp_path, held, sleeps):
    sleeps["then"] = held.close
    with lock_workdir(tmp_path, process_id=0, undo=contextlib.ExitStack()) as locked:
        assert locked


def test_a_run_that_lives_keeps_another_out(tmp_path, held, sleeps, monkeypatch):
    waited = []
    monkeypatch.setattr(files, "LOCK_WITHIN_S", 0.01)
    sleeps["then"] = lambda: waited.append(1)
    with pytest.raises(TransientError, match="another run is using it"):
        lock_workdir(tmp_path, process_id=0, undo=contextlib.ExitStack()).__enter__()
    assert waited


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for process_id, warnings in ((0, 1), (1, 0)):
        with lock_workdir(tmp_path, process_id=process_id, undo=contextlib.ExitStack()) as locked:
            assert not locked
        text = capsys.readouterr().err
        assert text.count(f"cannot be locked ({os.strerror(number)})") == warnings


def test_the_c_librarys_refusals_are_told_apart(tmp_path):
    library = tmp_path / "no_locks.so"
    source = Path(__file__).with_name("no_locks.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        "import sys; from llamajax.files import lock_file\n"
        "try: print(lock_file(open(sys.argv[1], 'w'), within_s=0))\n"
        "except BlockingIOError: print('in use')"
    )
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EWOULDBLOCK):
        shim = {"LD_PRELOAD": str(library), "NO_LOCKS_ERRNO": str(int(number))}
        command = [sys.executable, "-c", code, str(tmp_path / "lock")]
        done = subprocess.run(command, env=os.environ | shim, capture_output=True, text=True)
        wanted = "in use" if number == errno.EWOULDBLOCK else os.strerror(number)
        assert done.stdout == f"{wanted}\n", done.stderr


def test_a_lock_ends_with_its_file(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        assert lock_file(file, within_s=0) is None
        with (tmp_path / "lock").open("w") as other, pytest.raises(BlockingIOError):
            lock_file(other, within_s=0)
    with (tmp_path / "lock").open("w") as other:
        assert lock_file(other, within_s=0) is None
