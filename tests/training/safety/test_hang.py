"""A block without a sign of life ends the process; one that saves does not."""

import threading

import pytest

from llamajax.errors import UserError
from llamajax.training.safety.hang import HangWatch


def watch(tmp_path, limit_s=10.0):
    said, codes = [], []
    found = HangWatch(
        limit_s, file=tmp_path / "box" / "hang.txt", on_hang=said.append, exit_process=codes.append
    )
    return found, said, codes


def test_silence_for_the_limit_writes_all_stacks_and_leaves(tmp_path, capfd):
    found, said, codes = watch(tmp_path)
    other, done = threading.Event(), threading.Event()

    def stands_still():
        other.set()
        done.wait()

    thread = threading.Thread(target=stands_still)
    thread.start()
    other.wait()
    found.tick(9.0)
    assert codes == []
    found.tick(1.0)
    done.set()
    thread.join()
    assert codes == [1]
    assert "no step was finished within 10 s" in said[0]
    for text in ((tmp_path / "box" / "hang.txt").read_text(), capfd.readouterr().err):
        assert "stands_still" in text
        assert "test_hang.py" in text


def test_a_beat_starts_the_count_again_and_a_pause_holds_it(tmp_path):
    found, _, codes = watch(tmp_path)
    found.tick(9.0)
    found.beat()
    found.tick(9.0)
    with found.paused():
        found.tick(100.0)
    found.tick(9.0)
    assert codes == []
    found.tick(1.0)
    assert codes == [1]


def test_the_thread_itself_ends_it_and_without_a_limit_there_is_none(tmp_path):
    left = threading.Event()
    with HangWatch(
        0.02, file=tmp_path / "f", on_hang=lambda _: None, exit_process=lambda _: left.set()
    ):
        assert left.wait(30)
    before = threading.active_count()
    with watch(tmp_path, None)[0]:
        assert threading.active_count() == before


def test_a_farewell_that_blocks_or_fails_does_not_keep_the_process(tmp_path, monkeypatch):
    """As on a file system that is gone: the same one that hung the run."""
    monkeypatch.setattr("llamajax.training.safety.hang._EXIT_WITHIN_S", 0.05)
    left, done = threading.Event(), threading.Event()

    def block(_: str) -> None:
        done.wait()

    stuck = HangWatch(10.0, file=tmp_path / "f", on_hang=block, exit_process=lambda _: left.set())
    thread = threading.Thread(target=stuck.tick, args=(10.0,))
    thread.start()
    assert left.wait(30)
    done.set()
    thread.join()

    def fail(_: str) -> None:
        raise UserError("gone")

    codes: list[int] = []
    failing = HangWatch(10.0, file=tmp_path / "f", on_hang=fail, exit_process=codes.append)
    with pytest.raises(UserError):
        failing.tick(10.0)
    assert codes == [1]
