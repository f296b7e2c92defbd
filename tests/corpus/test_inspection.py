"""`prepare --inspect` finds what was planted, and nothing where nothing was."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from refusal import refused

from llamajax import prepare
from llamajax.corpus.document_hashes import CopyCounter
from llamajax.corpus.inspection import (
    directory_inspection,
    document_reader,
    inspection_output,
    ngram_overlap,
)
from llamajax.corpus.inspection.directory_inspection import open_directory
from llamajax.corpus.inspection.document_reader import DocumentReader, DocumentRun
from llamajax.corpus.inspection.near_duplicates import near_duplicates, sketches
from llamajax.data.prepared_split import PreparedSplit

RNG = np.random.default_rng(3)


def words(letters: str, count: int) -> list[str]:
    return ["".join(RNG.choice([*letters], size)) for size in RNG.integers(2, 9, count)]


LANGUAGE = words("aeioubcdfglmnrst", 600)


def texts(count: int, language: Sequence[str] = LANGUAGE) -> list[str]:
    return [" ".join(RNG.choice(language, size)) for size in RNG.integers(30, 90, count)]


CLEAN = texts(500)


def _changed(text: str) -> str:
    return text[:70] + "XYZ" + text[70:]


PLANTED = {
    "nothing": lambda d: d,
    "copies": lambda d: [*d, *d[100:107], d[100]],
    "near": lambda d: [*d, *map(_changed, d[100:107])],
    "language": lambda d: [*d, *texts(1, words("äöüßkqxyz", 50))],
    "unshuffled": lambda d: [*texts(250, words("aeiouklmnrst", 200)), *d[:250]],
}


@pytest.fixture
def inspected(tmp_path: Path, capsys) -> Callable[..., dict]:
    """Prepare documents and inspect them: the figures, with the text that was printed."""

    def inspect(documents: Sequence[str], *flags: str, fraction: float = 0.0) -> dict:
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (tmp_path / "in.jsonl").write_text("".join(lines), "utf-8")
        args = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out'}"]
        args += [f"--validation_fraction={fraction}", "--tokenizer=byte", "--workers=1"]
        assert prepare.main([*args, "--overwrite"]) == 0
        prepared = capsys.readouterr().out
        json_file = tmp_path / "out.json"
        args = [f"--inspect={tmp_path / 'out'}", "--seq_len=1000", f"--json={json_file}", *flags]
        assert prepare.main(args) == 0
        found = json.loads(json_file.read_text("utf-8"))
        return found | {"text": capsys.readouterr().out, "prepared": prepared}

    return inspect


def findings(found: dict) -> list[str]:
    lines = found["text"].partition("\nfindings")[2].partition("\n\n")[0].splitlines()
    return [line.strip() for line in lines[1:]]


@pytest.mark.parametrize("planted", PLANTED)
def test_it_finds_what_was_planted_and_nothing_else(planted, inspected):
    found = inspected(PLANTED[planted](CLEAN))
    train = found["splits"]["train"]
    copies, near = train["copies"]["exact"], train["copies"]["near"]
    order, odd = train["order"], train["unlike"]["documents"]
    alike = order["correlation"] > 4 * order["standard_error"]
    expected = {
        "copies": (8, 0, False, 0),
        "near": (0, 7, False, 0),
        "language": (0, 0, False, 1),
        "unshuffled": (0, 0, True, 0),
    }
    assert (copies, near, alike, odd) == expected.get(planted, (0, 0, False, 0))
    said = findings(found)
    assert len(said) == 1
    assert (said == ["none"]) == (planted == "nothing")
    assert f"\n            {copies} documents are exact copies" in found["prepared"]
    if planted == "copies":
        assert "8 of 508 documents" in said[0]
        frequent = train["most_frequent"]
        assert [d["times"] for d in frequent] == [3, 2, 2, 2, 2]
        assert CLEAN[100].startswith(frequent[0]["text"].removesuffix(" ..."))
    elif planted == "near":
        earlier = {d["earlier_at"] for d in train["nearly_the_same"]}
        starts = np.cumsum([0, *(len(text) + 2 for text in CLEAN)])
        assert earlier <= set(starts[100:107].tolist())
    elif planted == "language":
        assert {*train["farthest"][0]["text"]} & {*"äöüß"}
    elif planted != "nothing":
        assert "not shuffled" in said[0]
        assert "(shuffled: 0 ± 0.0" in said[0]
        train["packing"]["efficiency"] = 1.0  # whole examples: a row has them from anywhere
        assert list(inspection_output.findings(found)) == []


def test_it_finds_text_of_validation_and_evaluation_in_train(inspected, tmp_path):
    questions = [{"question": CLEAN[5], "choices": [CLEAN[9], "no"]}, {"question": texts(1)[0]}]
    questions += [{"question": "too short"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "book.txt").write_text(" ".join(texts(3)) + CLEAN[20])
    against = f"--against={file},{tmp_path / 'book.txt'}"
    clean = inspected(CLEAN, against, fraction=0.05)
    rows, book, held = clean["overlap"]
    assert (rows["rows"], rows["rows_found_whole"], rows["too_short"]) == (3, 1, 1)
    assert clean["overlapping_rows"][0]["row"] == f"{file}:1"
    assert 0.1 < book["found_share"] < 0.5
    assert (held["found_share"], book["rows_half_found"]) == (0, 0)
    assert [line for line in findings(clean) if "validation" in line] == []
    # What is held out is decided by the order alone, and one more document changes none of it.
    sample = clean["splits"]["validation"]["samples"][0]
    text = next(t for t in CLEAN if t.startswith(sample["text"].removesuffix(" ...")))
    planted = inspected([*CLEAN, f"{CLEAN[0]} {text}"], against, fraction=0.05)
    held = planted["overlap"][2]
    assert held["rows_half_found"] == 1
    assert (
        f"train holds at least half of 1 of {held['rows']} rows of validation"
        in (findings(planted)[-1])
    )
    at = planted["overlapping_rows"][-1]["at_train_token"]
    assert text[:60] in _document(tmp_path / "out", at)


def _document(directory: Path, token: int) -> str:
    manifest, tokenizer = open_directory(directory)
    reader = DocumentReader(PreparedSplit(directory, manifest, "train"), tokenizer)
    start, end = reader.document_at(token)
    assert start <= token < end
    return reader.text(start, end, shown=end)


@pytest.mark.parametrize("documents", [["a"], ["b", "b", "c d"]])
def test_a_tiny_set(documents, inspected):
    train = inspected(documents)["splits"]["train"]
    assert (train["copies"]["exact"], train["order"]) == (len(documents) // 2, {})


def test_the_figures_of_lengths_and_packing(inspected, tmp_path):
    train = inspected(CLEAN)["splits"]["train"]
    lengths = np.array([len(text) + 2 for text in CLEAN])
    starts = np.cumsum(lengths) - lengths
    packing = train["packing"]
    assert train["lengths"]["max"] == lengths.max()
    assert train["lengths"]["mean"] == pytest.approx(lengths.mean())
    cut = starts // 1000 != (starts + lengths - 2) // 1000  # windows share a token
    assert 0 < packing["cut_documents_share"] == pytest.approx(cut.mean())
    exact = inspected(["x" * 999] * 9)["splits"]["train"]["packing"]  # of seq_len + 1 tokens
    assert exact["longer_documents_share"] == 0
    assert packing["unpacked_padding_share"] == pytest.approx(1 - lengths.mean() / 1000)
    assert packing["unread_tokens"] == (lengths.sum() - 1) % 1000
    assert train["bytes_per_token"] == pytest.approx(1 - 2 / lengths.mean())
    first = [part for part in train["samples"] if part["sample"] == 0]
    assert sum(part["length"] for part in first) == 1000
    assert {part["begins"] for part in first} == {"document"}
    assert [part["ends"] for part in first] == ["with it"] * (len(first) - 1) + ["cut"]


def test_the_page_holds_the_tables_and_no_markup_of_documents(inspected, tmp_path):
    found = inspected(["<script>alert(1)</script> & " * 9] * 2 + CLEAN)
    page = (tmp_path / "out" / "inspect.html").read_text("utf-8")
    assert "<script" not in page
    shown = html.unescape(page)
    assert "<script>alert(1)</script> &" in shown
    assert all(line in shown for line in findings(found))


@pytest.mark.parametrize("max_tokens", [None, 40_000])
def test_documents_are_read_in_order_whole_or_an_even_sample(
    max_tokens, inspected, tmp_path, monkeypatch
):
    monkeypatch.setattr(document_reader, "_GROUP_BLOCKS", 2)
    monkeypatch.setattr(document_reader, "_RUN_GROUPS", 1)
    monkeypatch.setattr(document_reader, "MAX_DOCUMENT", 9_000)
    long = [" ".join(texts(90)), " ".join(texts(9))]
    documents = [*texts(100), long[0], *texts(60), long[1], *texts(200), long[0]]
    found = inspected(documents, f"--max_tokens={max_tokens or 'none'}")
    assert ("of the tokens were read" in found["text"]) == (max_tokens is not None)
    assert "of 2 documents the first" in found["text"] or max_tokens
    manifest, tokenizer = open_directory(tmp_path / "out")
    reader = DocumentReader(PreparedSplit(tmp_path / "out", manifest, "train"), tokenizer)
    lengths = np.array([len(text.encode()) + 2 for text in documents])
    starts = np.cumsum(lengths) - lengths
    seen = []
    for run in reader.runs(max_tokens):
        numbers = np.searchsorted(starts, run.starts).tolist()
        assert starts[numbers].tolist() == run.starts.tolist()
        assert lengths[numbers].tolist() == run.full_lengths.tolist()
        for number, tokens in zip(numbers, np.split(run.tokens, run.offsets[1:]), strict=True):
            whole = [256, *documents[number].encode(), 257]
            assert tokens.tolist() == whole[:9_000]
        seen += numbers
    assert seen == sorted(set(seen))
    if max_tokens is None:
        assert seen == [*range(len(documents))]
    else:
        assert 20_000 < lengths[seen].sum() < 60_000
        assert len({start // (2 * 4096) for start in starts[seen]}) <= 40_000 // (2 * 4096)
    for number in (0, 5, 100, 170, len(documents) - 1):
        start = int(starts[number])
        ends = (start, start + int(lengths[number]))
        assert reader.document_at(start) == reader.document_at(ends[1] - 1) == ends


@pytest.mark.parametrize("max_tokens", [None, 50_000])
def test_copies_and_overlap_of_a_sample_are_lower_bounds(max_tokens, inspected, monkeypatch):
    monkeypatch.setattr(document_reader, "_GROUP_BLOCKS", 1)
    monkeypatch.setattr(document_reader, "_RUN_GROUPS", 1)
    twice = [*CLEAN[:250], *CLEAN[:250], *map(_changed, CLEAN[:250])]
    found = inspected(twice, f"--max_tokens={max_tokens or 'none'}", fraction=0.1)
    train = found["splits"]["train"]
    manifest, _ = open_directory(Path(found["directory"]))
    said = [line.partition(": ")[2] for line in findings(found) if line.startswith("train: ")]
    exact, share = manifest["splits"]["train"]["copies"], train["read_share"]
    assert exact > 150
    assert f"{exact} of {train['documents']} documents are exact copies of an earlier one" in said
    least = "at least " * (max_tokens is not None)
    assert (share == train["read_tokens"] / train["tokens"] < 1) == bool(least)
    assert any(line.startswith(f"{least}{train['copies']['near']} of ") for line in said)
    in_train = found["splits"]["validation"]["copies"]["in_train"]
    assert f"validation: {least}{in_train} of " in found["text"]
    half = found["overlap"][0]["rows_half_found"]
    assert f"train holds at least half of {least}{half} of " in found["text"]
    where = f"{share:.1%} of train" if least else "train"
    assert f"\noverlap with {where}\n" in found["text"]
    assert (f"only {share:.1%} of the tokens were read" in found["text"]) == bool(least)


def test_what_is_not_looked_for_is_said(inspected, tmp_path, monkeypatch):
    monkeypatch.setattr(document_reader, "_GROUP_BLOCKS", 1)
    monkeypatch.setattr(document_reader, "_RUN_GROUPS", 1)
    monkeypatch.setattr(ngram_overlap, "_PIECE", 2_000)
    monkeypatch.setattr(directory_inspection, "_MAX_REFERENCE_TOKENS", 9_000)
    file, book = tmp_path / "questions.jsonl", tmp_path / "book.txt"
    rows = [{"question": "q" * 4_000}, {"question": "r" * 3_999, "answer": "s" * 4_000}, {"a": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    book.write_text("t" * 9_000)
    found = inspected(CLEAN, f"--against={book},{file}", fraction=0.3)
    of_book, of_file, held = found["overlap"]
    assert (of_book["rows"], of_book["rows_left_out"], of_book["too_short"]) == (1, 0, 0)
    assert (of_file["rows"], of_file["rows_left_out"]) == (0, 3)
    rest = found["splits"]["validation"]["documents"] - held["rows"]
    said = {str(file): 3, "validation": rest}
    assert findings(found) == [
        f"{name}: {count} rows were not looked for in train, or only in part"
        for name, count in said.items()
    ]
    file_first = inspected(CLEAN, f"--against={file},{book}", fraction=0.3)["overlap"]
    # Of the second row the beginning was added, and nothing after it.
    assert [(o["rows"], o["rows_left_out"]) for o in file_first[:2]] == [(2, 2), (0, 1)]


@pytest.mark.parametrize(
    ("ngrams", "shared", "found"),
    [
        (500, 445, (97, 100)),  # similarity 0.80
        (500, 412, (45, 64)),  # 0.70
        (500, 375, (1, 9)),  # 0.60
        (64, 57, (94, 100)),  # 0.80
        (63, 62, (0, 0)),  # too short
    ],
)
def test_near_copies_are_found_at_the_stated_rates(ngrams, shared, found):
    pairs, n, rng = 400, 5, np.random.default_rng(0)
    length, same = ngrams + n - 1, shared + n - 1
    tokens = rng.integers(0, 1 << 31, (pairs, 2, length)).astype(np.uint32)
    tokens[:, 1, :same] = tokens[:, 0, :same]
    lengths = np.full(2 * pairs, length)
    run = DocumentRun(tokens.reshape(-1), lengths, lengths, np.cumsum(lengths) - lengths)
    near = near_duplicates(sketches(run, n))
    assert near.compared == (2 * pairs if ngrams >= 64 else 0)
    assert found[0] <= 100 * len(near.documents) / pairs <= found[1]
    np.testing.assert_array_equal(near.earlier, near.documents - 1)


def test_copies_are_counted_across_pieces_and_in_bounded_memory(monkeypatch):
    documents = [RNG.integers(0, 9, n).astype(np.uint16) for n in (3, 9, 1, 700, 5)]
    documents += [documents[3], documents[0], documents[0]]
    documents.append(np.append(np.uint16(9), documents[3][1:]))  # no copy: another first token
    documents.append(documents[3][::-1])  # nor another order
    counter = CopyCounter()
    for document in documents:
        pieces = np.array_split(document, min(3, len(document)))
        for i, piece in enumerate(pieces):
            counter.add(piece, [len(piece)], continues=i > 0)
    assert (counter.copies(), counter.bits) == (3, 0)
    whole = CopyCounter()
    whole.add(np.concatenate(documents), [len(d) for d in documents])
    assert whole.copies() == 3
    monkeypatch.setattr("llamajax.corpus.document_hashes._MAX_KEPT", 4000)
    many = CopyCounter()
    for part in np.split(np.arange(20_000) % 5_000, 20):
        many.add(part, [1] * len(part))
    assert many.bits >= 2
    assert many.copies() == pytest.approx(15_000, rel=0.15)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--against=none.jsonl"], "--against=none.jsonl: cannot be read: No such file"),
        (["--against=bad.jsonl"], "bad.jsonl:2: not valid JSON"),
        (["--against=a.parquet"], "a.parquet: name a .txt or .jsonl file"),
        (["--against=none.txt"], "--against=none.txt: cannot be read: No such file"),
        (["--at=99999999"], "has train tokens 0 to "),
        (["--at=1", "--against=bad.jsonl", "--html=a"], "no use for --against, --html: it shows"),
        (["--seq_len=0"], "must be at least 1"),
        (["--html=none/a.html"], "no directory to write it in"),
        (["--tokenizer=byte"], "--tokenizer: unknown flag"),
    ],
)
def test_wrong_input_is_one_message(flags, problem, inspected, tmp_path, monkeypatch):
    inspected(CLEAN[:20])
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"a": "b"}\n{\n')
    Path("a.parquet").write_bytes(b"")
    with refused(problem, unchanged=(tmp_path,)):
        prepare.main([f"--inspect={tmp_path / 'out'}", *flags])
