"""Documents out of every kind of file, and one message for every kind of broken one."""

import errno
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from workdirs import inputs, prepare_options

from llamajax.corpus.documents import Corpus
from llamajax.corpus.json_values import json_values
from llamajax.corpus.long_text import long_json
from llamajax.errors import UserError

TEXTS = ["first one\n", "二 second ü", "third\r\nline\x00end"]
WIKI = " \n = A = \n \n a , b \n \n = = S = = \n x \n \n = B = \n \n b1 \n"


def read(*paths: Path, text_key: str = "text", clean: str = "none") -> list[str]:
    options = {"text_key": text_key, "clean": clean}
    return list(Corpus(inputs(*paths, **options), prepare_options(**options)))


def found(pattern: Path | str) -> list[str]:
    return [str(file.path) for file in inputs(pattern)]


def parquet(path: Path, column: object, name: str = "text") -> bytes:
    pa.parquet.write_table(pa.table({name: column, "n": [0] * len(column)}), path)
    return path.read_bytes()


def arrow(write: Callable) -> bytes:
    table, buffer = pa.table({"n": [0] * len(TEXTS), "text": TEXTS}), pa.BufferOutputStream()
    with write(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return buffer.getvalue().to_pybytes()


def contents(tmp_path: Path) -> dict[str, tuple[bytes, list[str]]]:
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    return {
        ".txt": ("".join(TEXTS).encode(), ["".join(TEXTS)]),
        ".jsonl": (lines.encode(), TEXTS),
        ".parquet": (parquet(tmp_path / "made.bin", TEXTS), TEXTS),
        ".arrow": (arrow(pa.ipc.new_stream), TEXTS),
        "2.arrow": (arrow(pa.ipc.new_file), TEXTS),
        ".json": (json.dumps([{"text": t} for t in TEXTS], indent=1).encode(), TEXTS),
        ".tokens": (WIKI.encode(), [WIKI[2 : WIKI.index(" = B")], WIKI[WIKI.index(" = B") :]]),
    }


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    # several frames, as parallel compressors write them
    "2.zst": lambda b: b"".join(zstandard.ZstdCompressor().compress(p) for p in (b[:9], b[9:])),
    "2.gz": lambda b: gzip.compress(b[:9]) + gzip.compress(b[9:]),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    "kind", [".txt", ".jsonl", ".json", ".parquet", ".arrow", "2.arrow", ".tokens"]
)
def test_every_format_in_every_packing(tmp_path, kind, packing):
    content, texts = contents(tmp_path)[kind]
    path = tmp_path / f"f{kind.lstrip('2')}{packing.lstrip('2')}"
    path.write_bytes(PACK[packing](content))
    corpus = Corpus(inputs(path), prepare_options())
    assert list(corpus) == texts
    assert list(corpus) == texts  # a second walk starts again
    assert corpus.bytes_read == corpus.total_bytes == path.stat().st_size


def test_patterns_name_files_in_order_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "d/c.txt", "d/e/x.jsonl.zst", "d/README.md", "d/.hidden.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    assert found("d") == ["d/c.txt", "d/e/x.jsonl.zst"]
    assert found("*.txt") == ["a.txt", "b.txt"]
    assert found("b.txt, *.txt,d/*.txt,d") == [
        "b.txt", "a.txt", "d/c.txt", "d/e/x.jsonl.zst",
    ]  # fmt: skip
    Path("empty").mkdir()
    for pattern, message in {
        "none.txt": "no such file: none.txt",
        "none*.txt": "no file matches none",
        "d/README.md": "unknown kind of file",
        "empty": r"no \.txt, .*, \.npy files in directory empty",
        " , ": "--input is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            inputs(pattern)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", b'{"text": "a"}\n\n{"text": }\n', r"f.jsonl:3: not valid JSON"),
        ("f.jsonl", b'{"text": ' + b"[" * 200_000, "f.jsonl:1: not valid JSON: maximum recursion"),
        ("f.jsonl", b'["a"]\n', r"f.jsonl:1: of type list, not a JSON object"),
        ("f.jsonl", b'{"txt": "a"}\n', r"f.jsonl:1: no key 'text' .*'txt'.*--text_key"),
        ("f.jsonl", b'{"text": null}\n', r"f.jsonl:1: 'text' is null, not a string"),
        ("f.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff at offset 24"),
        ("f.txt", b"abc\xc3(", "f.txt: not UTF-8: byte 0xc3 at offset 3"),
        ("f.tokens", b" = A = \n \xe9\n", "f.tokens: not UTF-8: byte 0xe9 at offset 9"),
        ("f.jsonl", b'\xef\xbb\xbf{"text": "\xff"}\n', "byte 0xff at offset 13"),
        ("f.txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-9], "f.txt.gz: truncated or damaged"),
        ("f.txt.zst", PACK[".zst"](b"abc" * 999)[:-3], "f.txt.zst: truncated or damaged"),
        # a frame whose header asks for a window of 2 GiB, as zstd --long=31 writes it
        ("f.txt.zst", bytes.fromhex("28b52ffd00a8"), "written by zstd --long"),
        ("f.json", b'[{"text": "a"},\n {"text": "b"}', "f.json: truncated or not valid JSON"),
        ("f.json", b'[{"text": "a"}, {"text": "b', "f.json: row 2: truncated or not valid JSON"),
        ("f.json", b'[{"text": "a"} {"text": "b"}]', "f.json: row 2: not valid JSON: no comma"),
        ("f.json", b'[{"text": "a"}]\n[]', "f.json: truncated or not valid JSON"),
        ("f.json", b'[{"text": "a"}, 5]', "f.json: row 2: of type int, not a JSON object"),
        ("f.json", b'[{"text": "a"}, {"txt": "b"}]', "f.json: row 2: no key 'text'"),
        ("f.json", b'{\n "text": "a"\n}', "f.json: one JSON object over several lines; what is"),
        ("f.arrow", arrow(pa.ipc.new_stream)[:-8], "f.arrow: truncated or damaged Arrow: it has"),
        ("f.arrow", b"", "f.arrow: truncated or damaged Arrow"),
        ("f.parquet", b"PAR1abcdefgh", "f.parquet: truncated or damaged Parquet"),
        ("f.txt", "abc".encode("utf-16"), "f.txt: is UTF-16; convert it"),
        ("f.jsonl", "{}".encode("utf-16"), "f.jsonl: is UTF-16; convert it"),
        *(
            (name, b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull")
            for name in ("f.txt", "f.jsonl", "f.parquet", "f.txt.gz")
        ),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        (["a"], "body", "has the columns body, n, but no 'text'; name the right .* --text_key"),
        ([1, 2], "text", "row 1: 'text' is of type int, not a string"),
        (["a", None], "text", "row 2: 'text' is null"),
        ([b"a", b"\xff"], "text", r"row 2: not UTF-8 \(invalid start byte\)"),
        (pa.array([b"a", b"\xff"]).view(pa.string()), "text", "row 2: not UTF-8"),
        (["a"], "n", "two columns are named 'n'"),
    ],
)
def test_parquet_of_the_wrong_shape(tmp_path, column, name, message):
    table = pa.Table.from_arrays([pa.array(column), pa.array([0] * len(column))], [name, "n"])
    pa.parquet.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "f.parquet", text_key="n" if name == "n" else "text")


def test_other_string_columns(tmp_path):
    kinds = (pa.large_string(), pa.dictionary(pa.int8(), pa.string()))
    kinds += (pa.string_view(), pa.binary(), pa.large_binary())
    for i, kind in enumerate(kinds):
        parquet(tmp_path / f"{i}.parquet", pa.array(TEXTS).cast(kind), "body")
        assert read(tmp_path / f"{i}.parquet", text_key="body") == TEXTS


@pytest.mark.parametrize("chunk", [3, 7, 50])
def test_an_array_is_read_in_chunks(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("llamajax.corpus.input_files.CHUNK", chunk)
    rows = [{"text": t, "n": [1, {"a": "]}"}]} for t in (*TEXTS, "x" * 99, '"],[\\')]
    rows[0]["x"] = [1.5e-300, True, None, "\ud83d\udd99\\n", -1]
    for indent in (None, 2):
        (tmp_path / "f.json").write_text(f"\n{json.dumps(rows, indent=indent)}\n")
        assert read(tmp_path / "f.json") == [row["text"] for row in rows]


@pytest.mark.parametrize("wrong", ['{"text" "b"}', '{"text": 1 2}', "[" * 5000])
def test_what_no_more_text_can_mend_is_raised_at_once(tmp_path, wrong, monkeypatch):
    monkeypatch.setattr("llamajax.corpus.input_files.CHUNK", 50)
    content = f"[{wrong}, ".encode() + b'{"text": "c"}, ' * 2000 + b"\xff"
    stream = io.BufferedReader(io.BytesIO(content), 50)
    with pytest.raises(UserError, match=r"f\.json: row 1: truncated or not valid JSON"):
        list(json_values(tmp_path / "f.json", stream))


@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_a_bad_byte_costs_its_own_document_only(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("llamajax.corpus.input_files.CHUNK", chunk)
    for name, size in [("LONG_CHARS", 15), ("CHUNK", chunk)]:
        monkeypatch.setattr(f"llamajax.corpus.long_text.{name}", size)
    texts = [b"document %d, \xc3\xa9" % number for number in range(90)]
    bad = [*texts]
    for number in (30, 31, 89):
        bad[number] = b"\xff<|" + bad[number][:5] + b"\xe9\xe9 <\xff|> " + bad[number] + b"\xc3"
    (tmp_path / "f.txt").write_bytes(b"<|>".join(bad))
    articles = [f"\n = {c} = \n\n words of {c}\n".encode() for c in "ABCD"]
    articles[1] += b" a bad line \xe9\n"
    (tmp_path / "f.raw").write_bytes(b"".join(articles))
    lines = "".join(f'{{"text": "{random.random()}"}}\n' for _ in range(20_000)).encode()
    for name, pack in (("f.jsonl.gz", gzip.compress), ("f.jsonl.zst", PACK[".zst"])):
        packed = pack(lines)
        (tmp_path / name).write_bytes(packed[: len(packed) * 3 // 4])
    kept = {"f.txt": (87, 3), "f.raw": (4, 1), "f.jsonl.gz": (14_000, 1), "f.jsonl.zst": (9000, 1)}
    for name, (least, rows) in kept.items():
        options = {"document_separator": "<|>", "on_error": "skip"}
        corpus = Corpus(inputs(tmp_path / name, **options), prepare_options(**options))
        sizes = list(corpus.check())
        documents = ["".join(document) for document in corpus]
        assert [len(document) for document in documents] == sizes
        assert (len(sizes) >= least, corpus.left_out.rows) == (True, rows), name
        if name == "f.txt":
            good = [text.decode() for n, text in enumerate(texts) if n not in (30, 31, 89)]
            assert documents == good


def test_byte_order_marks_and_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c"}\n{"text": ""}\n')
    (tmp_path / "d.txt.gz").write_bytes(b"")
    (tmp_path / "e.jsonl").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "f.jsonl").write_text("\u00a0\n \u3000\n")
    parquet(tmp_path / "g.parquet", [" " * 5_000_000])
    assert read(tmp_path) == ["abc", "c"]


def test_cleaning_joins_lines_and_rows_to_articles(tmp_path):
    """Hugging Face ships WikiText as rows of Parquet and JSON lines, blank lines empty."""
    for name in ("f.txt", "f.tokens", "f.train.raw"):
        (tmp_path / name).write_text(WIKI)
    parquet(tmp_path / "lines.parquet", WIKI.splitlines(keepends=True))
    raw = WIKI.replace(" \n", "\n")
    rows = ["" if line == "\n" else line for line in raw.splitlines(keepends=True)]
    parquet(tmp_path / "rows.parquet", rows)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(lines.encode()))
    cleaned = ["= A =\n\na, b\n\n== S ==\nx\n", "= B =\n\nb1\n"]
    assert read(tmp_path, clean="wikitext") == cleaned * 6
    articles = [f" = {c} = \n\n text {c} .\n" for c in "AB"]  # an article a row
    parquet(tmp_path / "articles.parquet", articles)
    assert len(read(tmp_path / "articles.parquet", clean="wikitext")) == 2


def test_a_directory_is_read_whole_and_what_is_not_is_named(tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.txt").write_text("c")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    line = json.dumps({"text": "b"}).encode()
    (folder / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(line))
    (folder / "d.ndjson").write_text('{"text": "d"}')
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    for name in ("dataset_infos.json", "README.md", ".hidden.txt"):
        (folder / name).write_text("{}")
    assert sorted(read(folder)) == ["b", "c", "d"]
    assert "3 left out of" in (said := capsys.readouterr().err)
    assert "README.md, dataset_infos.json, lost; name a .json" in said
    assert found(f"{folder}/[dl]*d*") == [str(folder / "d.ndjson")]
    assert "1 left out of" in (said := capsys.readouterr().err)
    assert said.endswith("folder/linked\n")


def test_a_directory_is_read_in_one_order_whatever_the_file_system(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    walk = os.walk

    def turned(*args, **settings):
        for step in walk(*args, **settings):
            step[1].sort(reverse=True)
            yield step

    monkeypatch.setattr("os.walk", turned)
    assert found(tmp_path) == [str(tmp_path / "a" / "x.txt")]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match="closed: cannot be listed: Permission denied"):
        inputs(tmp_path)


def test_long_strings_of_a_json_line_are_read_in_chunks_as_a_whole(monkeypatch):
    """Escapes, halves of surrogate pairs and characters of several bytes at the chunks' ends."""
    rng = random.Random(1)
    pool = ["a", '"', "\\", "\n", "é", "日", "🦙", "\ud83d", "\udd99", "\x00", "u", "d8", "\\u"]
    monkeypatch.setattr("llamajax.corpus.long_text.LONG_CHARS", 20)
    for _ in range(1000):
        monkeypatch.setattr("llamajax.corpus.long_text.CHUNK", rng.randint(7, 13))
        text = "".join(rng.choice(pool) for _ in range(rng.randrange(80)))
        if is_plain := rng.random() < 0.5:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        line = json.dumps({"n": '"\\', 'te"xt': text, "z": ["q\\"]}, ensure_ascii=not is_plain)
        value = long_json(line.encode(), "here")
        assert "".join(value['te"xt']) == json.loads(line)['te"xt']
        assert value | {'te"xt': ""} == {"n": '"\\', 'te"xt': "", "z": ["q\\"]}
