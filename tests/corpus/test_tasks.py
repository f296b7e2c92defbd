"""Preparing as an array of tasks gives what one process gives, byte for byte, whatever happens."""

import os
from pathlib import Path

import numpy as np
import pytest
from workdirs import contents, write_rows
from workdirs import run_prepare as run

from llamajax.errors import UserError

WORDS = ["whale", "ship", "sea", "Ahab", "the", "a", "white", "harpoon", "said", "\n\n", "ü", "€"]


def words(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def write_many(folder: Path) -> None:
    """1,300 documents in five files of several sizes: one in a hundred is held out."""
    rng = np.random.default_rng(0)
    for name, count in {"a": 30, "b": 700, "c": 1, "d": 400, "e": 169}.items():
        write_rows(folder / f"{name}.jsonl", *({"text": words(rng, 60)} for _ in range(count)))


def write_books(folder: Path) -> None:
    """Three texts, too long for any to be held out whole."""
    rng = np.random.default_rng(1)
    for name in "abc":
        (folder / f"{name}.txt").write_text(words(rng, 9000))


def write_stories(folder: Path) -> None:
    """Forty texts, of which some are held out whole."""
    rng = np.random.default_rng(2)
    for number in range(40):
        (folder / f"{number}.txt").write_text(words(rng, 900))


def write_chats(folder: Path) -> None:
    """Instructions in three files."""
    rng = np.random.default_rng(3)
    for name in "abc":
        pairs = [{"prompt": words(rng, 9), "completion": words(rng, 20)} for _ in range(90)]
        write_rows(folder / f"{name}.jsonl", *pairs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def many(folder: Path) -> Path:
    write_many(folder)
    return folder


@pytest.mark.parametrize("num_tasks", [1, 3, 7])
@pytest.mark.parametrize(
    ("write", "tokenizer", "flags"),
    [
        (write_many, "train:330", []),
        (write_books, "byte", ["--validation_fraction=0.02"]),
        (write_stories, "byte", ["--validation_fraction=0.2"]),
        (write_chats, "byte", ["--format=instructions", "--validation_fraction=0.1"]),
    ],
)
def test_merged_tasks_are_one_process_byte_for_byte(
    write, tokenizer, flags, num_tasks, folder, tmp_path
):
    write(folder)
    run(folder, tmp_path / "one", *flags, tokenizer=tokenizer)
    flags = [*flags, f"--num_tasks={num_tasks}"]
    for index in reversed(range(num_tasks)):
        run(folder, tmp_path / "all", *flags, f"--task_index={index}", tokenizer=tokenizer)
    run(folder, tmp_path / "all", *flags, "--merge", tokenizer=tokenizer)
    assert contents(tmp_path / "all") == contents(tmp_path / "one")
    assert not (tmp_path / "all.parts").exists()


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_single_article_is_named_by_one_process_and_by_the_merge(
    num_files, folder, tmp_path, capsys
):
    for number in range(num_files):
        (folder / f"{number}.txt").write_text("no title\n\nanywhere\n" * 99)
    flags, outputs = ("--clean=wikitext", "--num_tasks=2"), []
    for index in range(2):
        run(folder, tmp_path / "out", *flags, f"--task_index={index}")
    assert "single article" not in capsys.readouterr().err
    run(folder, tmp_path / "out", *flags, "--merge")
    outputs.append(capsys.readouterr().err)
    run(folder, tmp_path / "one", "--clean=wikitext")
    outputs.append(capsys.readouterr().err)
    assert ["a single article in all files" in said for said in outputs] == [num_files == 1] * 2


def test_a_task_that_was_killed_is_run_again_and_a_finished_one_is_left_alone(
    many, tmp_path, capsys
):
    flags = ("--num_tasks=2", "--task_index=1")
    part = tmp_path / "out.parts" / "part-00001-of-00002"
    hidden = part.with_name(f".{part.name}.partial")
    hidden.mkdir(parents=True)
    (hidden / "tokens.bin").write_bytes(b"of one that was killed")
    run(many, tmp_path / "out", *flags)
    assert not hidden.exists()
    before = {file: file.stat().st_mtime_ns for file in part.iterdir()}
    capsys.readouterr()
    run(many, tmp_path / "out", *flags)
    assert "is there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in part.iterdir()} == before


def test_a_merge_names_the_parts_that_are_missing_and_writes_nothing(many, tmp_path):
    run(many, tmp_path / "out", "--num_tasks=3", "--task_index=1")
    with pytest.raises(UserError, match=r"lacks 2 of 3 parts.*--task_index of 0, 2"):
        run(many, tmp_path / "out", "--num_tasks=3", "--merge")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.parts"]


def test_parts_of_another_command_are_refused(many, tmp_path):
    for index in (0, 1):
        run(many, tmp_path / "out", "--num_tasks=2", f"--task_index={index}")
    with (many / "e.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="made with another input; remove it"):
        run(many, tmp_path / "out", "--num_tasks=2", "--task_index=0")
    with pytest.raises(UserError, match="not of this command"):
        run(many, tmp_path / "out", "--num_tasks=2", "--merge")
    for index in (0, 1):
        run(many, tmp_path / "out", "--num_tasks=2", f"--task_index={index}", "--overwrite")
    tokens = tmp_path / "out.parts" / "part-00000-of-00002" / "tokens.bin"
    os.truncate(tokens, tokens.stat().st_size - 2)
    with pytest.raises(UserError, match="was cut short"):
        run(many, tmp_path / "out", "--num_tasks=2", "--merge")
    assert not (tmp_path / "out").exists()
