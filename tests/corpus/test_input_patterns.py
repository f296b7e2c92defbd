"""Which files --input means: saved folders of `datasets`, declared splits, options of an input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from workdirs import contents, inputs, write_rows
from workdirs import run_prepare as run

from llamajax.data.prepared_split import read_manifest
from llamajax.errors import UserError

SAVED = Path(__file__).parent / "saved"  # by `write_saved.py`
CHATS = ("--format=instructions", "--chat_template=llama2", "--validation_fraction=0.2")


def found(*patterns: Any) -> list[tuple[str, str | None]]:
    """The files of inputs, each with the split that it is declared to be of."""
    return [(file.path.name, file.split) for file in inputs(*patterns)]


def documents(directory: Path) -> dict[str, int]:
    return {name: each["documents"] for name, each in read_manifest(directory)["splits"].items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return shutil.copytree(SAVED, tmp_path / "saved")


@pytest.mark.parametrize("flags", [(), CHATS])
def test_a_saved_dataset_is_prepared_by_its_splits_as_its_rows_in_json_lines_are(
    saved, tmp_path, flags, capsys
):
    (saved / "train" / "cache-123.arrow").write_bytes(b"of map")
    run(saved, tmp_path / "out", *flags)
    said = (
        "validation_fraction is not used",
        "saved: files of these splits are read: train (2), validation (1); left out: test (1)",
    )
    printed = capsys.readouterr().err
    assert [words in printed for words in said] == [True, True]
    assert documents(tmp_path / "out") == {"train": 6, "validation": 3}
    rows = {}
    for split in ("train", "validation"):
        files = sorted((saved / split).glob("data-*.arrow"))
        tables = [pa.ipc.open_stream(file.read_bytes()).read_all() for file in files]
        rows[split] = pa.concat_tables(tables).to_pylist()
        write_rows(tmp_path / "lines" / f"{split}.jsonl", *rows[split])
        (tmp_path / "columns" / split).mkdir(parents=True)
        pa.parquet.write_table(pa.concat_tables(tables), tmp_path / "columns" / split / "0.parquet")
    assert rows["train"][0]["text"] == "Document 0 of the whale."
    expected = contents(tmp_path / "out")
    manifest = json.loads(expected.pop("manifest.json"))["input"]
    assert manifest["inputs"] == [{
        "path": str(saved), "files_read": {"train": 2, "validation": 1},
        "files_left_out": {"test": 1},
    }]  # fmt: skip
    assert "validation_fraction" not in manifest
    for kind in ("lines", "columns"):
        run(tmp_path / kind, tmp_path / f"{kind}_out", *flags)
        assert {**contents(tmp_path / f"{kind}_out"), "manifest.json": 0} == {
            **expected, "manifest.json": 0,
        }  # fmt: skip


def test_tasks_give_the_bytes_of_one_process_with_splits_and_options_of_inputs(saved, tmp_path):
    write_rows(tmp_path / "web.jsonl", *({"body": f"page {n}"} for n in range(20)))
    (tmp_path / "book.txt").write_text("one<|endoftext|>two <|endoftext|>\nthree<|endoftext|>")
    source = (
        f"{saved},{tmp_path}/web.jsonl:text_key=body,"
        f"{tmp_path}/book.txt:document_separator=<|endoftext|>:into=train,"
        f"{saved}/test:split=all:into=validation"
    )
    run(source, tmp_path / "one")
    assert documents(tmp_path / "one") == {"train": 6 + 20 + 3, "validation": 3 + 2}
    for index in (2, 0, 1):
        run(source, tmp_path / "all", "--num_tasks=3", f"--task_index={index}")
    run(source, tmp_path / "all", "--num_tasks=3", "--merge")
    assert contents(tmp_path / "all") == contents(tmp_path / "one")
    given = read_manifest(tmp_path / "one")["input"]["inputs"]
    assert [entry.get("text_key") for entry in given] == [None, "body", None, None]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet "
         "data/validation-00000-of-00001.parquet data/test-00000-of-00001.parquet", [2, 1]),
        ("train/a.jsonl train/b.jsonl dev/a.jsonl test/c.jsonl", [2, 1]),
        ("wiki.train.tokens wiki.valid.tokens wiki.test.tokens", [1, 1]),
        ("c4-train.00000-of-01024.json.gz c4-validation.00000-of-00008.json.gz", [1, 1]),
        ("my_train_file.jsonl my_test_file.jsonl", 1),
        # No split is declared, or train alone: validation is held out as ever.
        ("part-00000-of-00002.parquet part-00001-of-00002.parquet", 2),
        ("train-00000-of-00001.parquet", 1),
        ("train.jsonl more.jsonl", 2),
        ("CC-MAIN-2024-10/000_00000.parquet latest.jsonl contest.txt a.test.of.love.txt", 4),
        # train, but no validation: test is left out
        ("train.jsonl test.jsonl", 1),
        # What is to be read has to be said.
        ("test-00000-of-00001.parquet", "declares the splits test; say"),
        ("data.jsonl test.jsonl", "declares the splits test, but not of .*data.jsonl; say"),
        ("train_sft-00000-of-00001.parquet test_sft-00000-of-00001.parquet",
         "declares the splits test_sft, train_sft; say what to read: .*:split=NAME, or split=all"),
    ],
)  # fmt: skip
def test_splits_by_the_names_of_files_and_folders(tmp_path, names, splits):
    for name in names.split():
        write_rows(tmp_path / name)
    if isinstance(splits, str):
        with pytest.raises(UserError, match=splits):
            found(tmp_path)
        name = splits.split()[3].rstrip(",;")
        assert found(f"{tmp_path}:split={name}") == [
            (file.name, None) for file in tmp_path.glob(f"{name}*")
        ]
    else:
        kinds = [split for _, split in found(tmp_path)]
        declared = [kinds.count(name) for name in ("train", "validation")]
        assert (len(kinds) if set(kinds) == {None} else declared) == splits
    assert len(found(f"{tmp_path}:split=all")) == len(names.split())


def test_a_glob_over_splits_is_a_declaration_and_a_glob_of_one_is_meant(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write_rows(tmp_path / f"{name}.jsonl")
    assert found(tmp_path / "*.jsonl") == [("train-00000-of-00001.jsonl", None)]
    assert found(tmp_path / "te*.jsonl") == [("test-00000-of-00001.jsonl", None)]


README = """---
license: mit
configs:
- config_name: large
  data_files:
  - split: train
    path: ["large/a-*", "large/b.parquet"]
  - split: validation
    path: large/held.parquet
- config_name: small
  data_files: small/*
---
# About
"""


def test_configs_of_a_readme(tmp_path):
    for name in ("large/a-1", "large/a-2", "large/b", "large/held", "small/x"):
        write_rows(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(README)
    large = [("a-1.parquet", "train"), ("a-2.parquet", "train"), ("b.parquet", "train")]
    assert found(f"{tmp_path}:config=large") == [*large, ("held.parquet", "validation")]
    assert found(f"{tmp_path}:config=small") == [("x.parquet", None)]
    with pytest.raises(
        UserError, match=r"declares the configs large, small; choose one with .*:config=NAME"
    ):
        found(tmp_path)
    with pytest.raises(UserError, match="declares the configs large, small; choose"):
        found(f"{tmp_path}:config=smal")
    (tmp_path / "README.md").write_text(README.replace("large/held", "large/lost"))
    with pytest.raises(UserError, match=r"no file matches .*large/lost\.parquet, which .*README"):
        found(f"{tmp_path}:config=large")
    assert found(f"{tmp_path}:config=large:split=train") == [(name, None) for name, _ in large]
    (tmp_path / "README.md").write_text(README.replace("large/held", "large/[ah]*"))
    with pytest.raises(UserError, match=r"large/a-1.parquet is in two splits of .*; choose"):
        found(f"{tmp_path}:config=large")
    for default in (
        README.replace("small\n", "default\n"),
        f"{README[:-12]}  default: true\n---\n",
    ):
        (tmp_path / "README.md").write_text(default)
        assert found(tmp_path) == [("x.parquet", None)]


@pytest.mark.parametrize(
    "configs",
    [
        "[", "3", "[a]", "[{data_files: x}]",
        *(
            f"[{{config_name: a, data_files: {files}}}]"
            for files in (
                "5", '[""]', "[null]", "/etc/*", "[{split: train, path: /etc/*}]", "[{path: null}]",
                "[{path: a.jsonl}, a.jsonl]", "{train: a.jsonl}", "a**.jsonl/**x",
            )
        ),
    ],
)  # fmt: skip
def test_a_readme_that_is_not_understood_is_named(tmp_path, configs):
    write_rows(tmp_path / "a.jsonl", {"text": "a"})
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    with pytest.raises(UserError, match=r"README\.md"):
        found(tmp_path)


def test_caches_of_a_saved_dataset_are_left_out_and_named(saved, capsys):
    for split in ("train", "validation"):
        shutil.copy(saved / "test" / "data-00000-of-00001.arrow", saved / split / "cache-1.arrow")
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [name for name, _ in found(saved / "train" / "*.arrow")] == names
    assert capsys.readouterr().err.endswith("train/cache-1.arrow\n")
    in_parent = [(name, "train") for name in names]
    assert found(saved.parent) == [*in_parent, ("data-00000-of-00001.arrow", "validation")]
    assert "saved/train/cache-1.arrow" in capsys.readouterr().err


def cut(file: Path, size: int) -> None:
    os.truncate(file, file.stat().st_size + size)


DAMAGE = {
    "truncated or damaged Arrow": lambda s: cut(s / "validation/data-00000-of-00001.arrow", -400),
    "truncated or damaged Arrow: it has no end mark": lambda s: cut(
        s / "validation/data-00000-of-00001.arrow", -8
    ),
    "train: lacks data-00001-of-00002.arrow, which state.json lists": lambda s: (
        s / "train/data-00001-of-00002.arrow"
    ).unlink(),
    "validation/state.json is not readable as JSON": lambda s: shutil.rmtree(s / "validation"),
    "dataset_dict.json: its splits are no list of names": lambda s: (
        s / "dataset_dict.json"
    ).write_text('{"splits": [1]}'),
    "saved: the dataset that was saved there has no rows": lambda s: (
        s / "dataset_dict.json"
    ).write_text('{"splits": []}'),
    "state.json: lists no _data_files": lambda s: (s / "train/state.json").write_text("{}"),
    "has the columns text, messages, tools, but no 'body'": lambda s: None,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folders_are_refused_and_leave_nothing(saved, tmp_path, message):
    DAMAGE[message](saved)
    key = "body" if "body" in message else "text"
    with pytest.raises(UserError, match=message):
        run(f"{saved}:text_key={key}", tmp_path / "out")
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.jsonl:text_keey=x", "a.jsonl:text_keey=x: unknown; did you mean text_key?"),
        ("a.jsonl:split=", r"a.jsonl:split= has no value"),
        ("a.jsonl:text_key=", r"a.jsonl:text_key= has no value"),
        ("a.jsonl:text_key=a:text_key=b", "text_key=b: text_key is given twice"),
        ("d:x=1/*.jsonl", r"unknown; an input may .* \(where the path has the colon, write \? for"),
        ("a.jsonl:colour=x", "unknown; an input may have text_key, clean, document_separator"),
        ("a.jsonl:clean=html", r"clean=html: expected none \| wikitext"),
        ("a.jsonl:into=test", r"into=test: expected train \| validation"),
        ("a.jsonl:format=instructions", r"--format is one for all inputs.*data\.path="),
        ("a.jsonl:document_separator=x", r"document_separator is for \.txt files"),
        ("a.jsonl:split=train", "a.jsonl:split=train: it declares none"),
        ("a.jsonl:config=x", "config is for directories"),
        (".:config=x", "declares the configs -; choose"),
        ("a.jsonl,a.jsonl:into=validation", "a.jsonl is in two inputs with different options"),
        ("none.jsonl:text_key=x", "no such file: none.jsonl"),
    ],
)
def test_wrong_options_of_an_input(tmp_path, given, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=message):
        inputs(given)


def test_a_file_whose_name_looks_like_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "run:lr=3.jsonl", {"text": "a"})
    assert found("run:lr=3.jsonl") == [("run:lr=3.jsonl", None)]
    assert found("run?lr=3.jsonl:text_key=a") == [("run:lr=3.jsonl", None)]
