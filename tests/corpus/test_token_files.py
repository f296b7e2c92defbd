"""Token files of other tools: the same shards as from text, whatever holds the tokens."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusal import refused
from small_tokenizers import small_ranks
from workdirs import contents, run_prepare

from llamajax import prepare
from llamajax.corpus import token_files
from llamajax.data.prepared_split import PreparedSplit, read_manifest
from llamajax.errors import UserError
from llamajax.tokenizers import load_tokenizer
from llamajax.tokenizers.tokenizer_export import export_tokenizer

BOS, EOS = 256, 257
MEGATRON = Path(__file__).with_name("small_megatron.bin")
TEXTS = ["Call me Ishmael.", "Some years ago", "ü, never mind"]  # those of small_megatron
TOKENS = np.array([t for text in TEXTS for t in (BOS, *text.encode(), EOS)])


def llmc(magic: int, version: int, tokens: np.ndarray, *, count: int | None = None) -> bytes:
    """A file as `write_datafile` of llm.c's data_common.py writes it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def split_of(directory: Path, split: str = "train") -> tuple[list[int], list[int]]:
    """Tokens and document starts of a split of one block."""
    (block,) = PreparedSplit(directory, read_manifest(directory), split).blocks([0])
    return block.tokens.tolist(), block.starts.tolist()


def write(folder: Path, name: str) -> Path:
    """Write TOKENS in the form that the name says."""
    path = folder / name
    if name == "megatron.bin":  # written by megatron-core 0.16.1, an empty document among them
        for suffix in (".bin", ".idx"):
            shutil.copy(MEGATRON.with_suffix(suffix), path.with_suffix(suffix))
    elif name == "llmc.bin":
        path.write_bytes(llmc(20240520, 1, TOKENS.astype(np.uint16)))
    elif name == "llmc3.bin":
        path.write_bytes(llmc(20240801, 7, TOKENS.astype(np.uint32)))
    elif name == "flat.npy":
        np.save(path, TOKENS.astype(">i8"))
    else:
        TOKENS.astype(np.uint16).tofile(path)
    return path


@pytest.mark.parametrize("chunk", [1 << 22, 7, 1])
@pytest.mark.parametrize("name", ["megatron.bin", "nano.bin", "flat.npy", "llmc.bin", "llmc3.bin"])
def test_tokens_make_the_shards_of_their_text(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(token_files, "_CHUNK", chunk)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    run_prepare(tmp_path / "text.jsonl", tmp_path / "a", "--validation_fraction=0.45")
    run_prepare(write(tmp_path, name), tmp_path / "b", "--validation_fraction=0.45")
    text, tokens = (read_manifest(tmp_path / directory) for directory in "ab")
    assert tokens["splits"] == text["splits"]
    assert set(tokens["splits"]) == {"train", "validation"}
    assert tokens["input"] == {"format": "tokens", "validation_fraction": 0.45, "files": [name]}
    assert "left_out" not in tokens


def test_rows_a_stream_without_eos_and_splits_by_name(tmp_path, capsys):
    rows = np.array([[1, 2, EOS, 3], [EOS, BOS, 4, 5]])
    np.save(tmp_path / "rows.npy", rows)
    run_prepare(tmp_path / "rows.npy", tmp_path / "a", "--validation_fraction=0")
    assert split_of(tmp_path / "a") == (rows.ravel().tolist(), [0, 3, 4, 5])
    left_out = read_manifest(tmp_path / "a")["left_out"]
    assert left_out == {"without_bos": 3, "without_eos": 2}
    stream = np.arange(200, dtype=np.uint16)
    (tmp_path / "set").mkdir()
    for name in ("train.bin", "val.bin"):
        stream.tofile(tmp_path / "set" / name)
    assert "no document ends with EOS" not in capsys.readouterr().err
    run_prepare(tmp_path / "set" / "train.bin", tmp_path / "b", "--validation_fraction=0.1")
    assert "no document ends with EOS (257)" in capsys.readouterr().err
    assert split_of(tmp_path / "b") == (list(range(180)), [0])
    assert split_of(tmp_path / "b", "validation") == (list(range(180, 200)), [0])
    run_prepare(tmp_path / "set", tmp_path / "c")
    assert split_of(tmp_path / "c") == split_of(tmp_path / "c", "validation")


def test_megatrons_prefix_and_index_name_the_same_file_and_it_can_be_inspected(tmp_path):
    write(tmp_path, "megatron.bin")
    found = []
    for name in ("megatron", "megatron.idx", "*", ""):
        run_prepare(
            tmp_path / name, tmp_path / "out" / "a", "--validation_fraction=0", "--overwrite"
        )
        found.append(contents(tmp_path / "out" / "a"))
    assert found[0] == found[1] == found[2] == found[3]
    page = tmp_path / "page.html"
    assert prepare.main([f"--inspect={tmp_path / 'out' / 'a'}", f"--html={page}"]) == 0
    assert "Some years ago" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "is empty"),
        ("a.bin", np.array([5, 7, 257], "<u4"), "every second token is 0: .*save them as .npy"),
        ("a.bin", b"abc", "3 bytes of tokens are no multiple of uint16"),
        ("a.bin", np.array([1, 258], "<u2"), r"token 258 at 1 \(read as uint16\) is outside"),
        ("a.npy", np.array([3, 1, -1]), "token -1 at 2"),
        ("a.npy", np.array([1.0]), r"float64 of shape \(1,\); tokens are whole numbers"),
        ("a.npy", np.zeros((1, 1, 1), int), r"of shape \(1, 1, 1\)"),
        ("a.npy", b"abcdefgh", "damaged, or no array of numbers"),
        ("a.bin", b"version https://git-lfs", "pointer of git-lfs"),
        ("a.bin", llmc(20240520, 1, TOKENS[:9], count=9)[:-8], "has 32 tokens, its header says 9"),
        ("a.bin", llmc(20240520, 1, TOKENS[:0]), "0 bytes of tokens"),
        ("a.bin", llmc(20240522, 1, TOKENS[:9]), "magic 20240522, version 1: not tokens that llm"),
        ("a.bin.gz", b"", "unknown kind of file"),
    ],
)  # fmt: skip
def test_files_that_are_not_tokens_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif name == "a.npy":
        np.save(file, content)
    else:
        content.tofile(file)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*{message}"):
        run_prepare(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens", "held"),
    [([EOS] * 6, None), ([1] * 40 + [EOS, EOS], [EOS]), ([EOS, 1, EOS], [EOS]), ([], None)],
)
def test_few_tokens_are_cut_where_there_are_two(tmp_path, tokens, held, capsys):
    np.save(tmp_path / "a.npy", np.array(tokens, int))
    if held is None:
        with pytest.raises(UserError, match="too little text to" if tokens else "no text in these"):
            run_prepare(tmp_path / "a.npy", tmp_path / "out", "--validation_fraction=0.01")
        assert "no document ends" not in capsys.readouterr().err
    else:
        run_prepare(tmp_path / "a.npy", tmp_path / "out", "--validation_fraction=0.01")
        assert split_of(tmp_path / "out", "validation") == (held, [0])


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (slice(0, 1), b"X", r"\.idx: not an index of Megatron-LM"),
        (slice(17, 18), b"\7", r"\.idx: version 1, dtype 7, 6 sequences: no tokens"),
        (slice(-1, None), b"", r"\.idx: has 145 bytes instead of 146: cut short"),
        (slice(26, 34), bytes(8), r"\.idx: version 1, .*: no tokens"),
        (slice(34, 35), b"\4", r"\.bin: 50 tokens, not in the places"),
        (slice(106, 107), b"\1", r"\.idx: its documents do not hold all sequences"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path, at, value, message):
    index = write(tmp_path, "megatron.bin").with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[at] = value
    index.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run_prepare(tmp_path / "megatron", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "tokenizer", "named"),
    [
        (["--clean=wikitext", "--on_error=skip"], "byte", ["--clean", "--on_error"]),
        (["--format=instructions"], "train:400", ["train:N (name", "--format=instructions"]),
        (["--num_tasks=2", "--task_index=0"], "byte", ["--num_tasks"]),
    ],
)
def test_flags_for_text_are_refused_in_one_message(tmp_path, flags, tokenizer, named):
    file = write(tmp_path, "nano.bin")
    with refused("holds tokens, which are taken as they are; that does not go with") as lines:
        run_prepare(file, tmp_path / "out", *flags, tokenizer=tokenizer)
    assert all(name in "".join(lines) for name in named)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="texts in the same --input"):
        run_prepare(f"{file},{tmp_path / 'a.txt'}", tmp_path / "out")


@pytest.mark.parametrize("name", ["byte", "llama2", "llama3", "parts", "parts/tokenizer.json"])
def test_bytes_of_tokens_are_those_of_the_text(name, assets, tmp_path):
    """Tokens that are two or three bytes of a character among them."""
    text = "A whale: ü 鯨と海 😀 naïve\n\n  x"
    parts = small_ranks(tmp_path / "parts", (b"\xe9\xaf", b"\xf0\x9f", b"\xf0\x9f\x98"))
    if name == "parts/tokenizer.json":
        parts.rename(tmp_path / "ranks")
        parts.mkdir()
        export_tokenizer(load_tokenizer(tmp_path / "ranks"), parts)
    known = {"byte": "byte", "parts": parts, "parts/tokenizer.json": tmp_path / name}
    tokenizer = load_tokenizer(known.get(name) or assets / "tokenizers" / f"{name}.model")
    ids = tokenizer.encode(text)
    sizes = tokenizer.token_bytes(range(tokenizer.vocab_size))
    prefix = sizes[tokenizer.encode("a")].sum() - 1
    assert tokenizer.token_bytes(set(ids))[ids].sum() - prefix == len(text.encode())
