"""The verb `prepare`: what it writes, that it writes all or nothing, what it refuses."""

import collections
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import warm
from shell import verb
from workdirs import contents, write_rows
from workdirs import run_prepare as run

from llamajax import prepare
from llamajax.corpus.documents import LeftOut
from llamajax.data import load_tokenizer
from llamajax.data.prepared_split import PreparedSplit, read_manifest
from llamajax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = ["whale", "ship", "sea", "Ahab", "the", "a", "white", "harpoon", "said", "old", "\n\n", "ü"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents of some words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 400, 300)]
    return write_rows(tmp_path / "corpus.jsonl", *({"text": text} for text in texts))


def blocks(path: Path, split: str) -> list[list]:
    """The blocks of a split: tokens with the next one, document starts, which tokens carry loss."""
    prepared = PreparedSplit(path, read_manifest(path), split)
    found = prepared.blocks(range(prepared.num_blocks))
    return [[a if a is None else a.tolist() for a in block] for block in found]


def stream(path: Path, split: str) -> tuple[list[int], list[int]]:
    """Tokens of a split, and where its documents start."""
    tokens, starts = [], []
    for number, (block, offsets, _) in enumerate(blocks(path, split)):
        tokens += block[:4096]
        starts += [4096 * number + o for o in offsets if o < 4096]
    return tokens, starts


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """250 conversations of one or two turns, half of them with a system message."""
    rng, rows = np.random.default_rng(1), []
    for number in range(250):
        said = [" ".join(rng.choice(WORDS[:10], size)) for size in rng.integers(1, 90, 4)]
        turns = zip(("user", "assistant") * 2, said[: 2 + 2 * (number % 3 == 0)], strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
        if number % 2:
            messages.insert(0, {"role": "system", "content": "be old"})
        rows.append({"messages": messages})
    return write_rows(tmp_path / "chats.jsonl", *rows)


INSTRUCTIONS = ("--format=instructions", "--chat_template=llama2", "--validation_fraction=0.1")
KINDS = pytest.mark.parametrize(("kind", "flags"), [("corpus", ()), ("chats", INSTRUCTIONS)])


@KINDS
@pytest.mark.parametrize("tokenizer", ["byte", "train:330"])
def test_the_output_does_not_depend_on_the_workers(
    kind, flags, tmp_path, tokenizer, monkeypatch, request
):
    monkeypatch.setattr("llamajax.corpus.tokenizing._BATCH_CHARS", 9_000)
    source, written = request.getfixturevalue(kind), []
    for workers in (1, 2, 3):
        output = tmp_path / f"out{workers}"
        assert run(source, output, *flags, f"--workers={workers}", tokenizer=tokenizer) == 0
        written.append(contents(output))
    assert written[0] == written[1] == written[2]
    kept = {"tokenizer.byte"} if tokenizer == "byte" else {"tokenizer.model"}
    kept |= {"chat_template.jinja", "generation_config.json"} if flags else set()
    names = {f.split("-")[0] for f in written[0]}
    assert names == {"manifest.json", "train", "validation", *kept}


def test_the_summary_of_instructions(chats, tmp_path, capsys):
    assert run(chats, tmp_path / "out", *INSTRUCTIONS) == 0
    splits, summary = read_manifest(tmp_path / "out")["splits"], capsys.readouterr().out
    for split, stats in splits.items():
        assert f"{split:<11} {stats['documents']} examples, {stats['tokens']:,} tokens" in summary
        share = stats["loss_tokens"] / stats["tokens"]
        assert f"{stats['loss_tokens']:,} tokens ({share:.1%}) carry loss" in summary
        assert 0.2 < share < 0.6
        assert f"longest example {stats['longest_document']:,} tokens" in summary
    assert sum(s["documents"] for s in splits.values()) == 250


@KINDS
def test_several_shards_are_one_stream(kind, flags, tmp_path, monkeypatch, request):
    source = request.getfixturevalue(kind)
    run(source, tmp_path / "one", *flags)
    monkeypatch.setattr("llamajax.data.shards.RECORDS_PER_SHARD", 7)
    monkeypatch.setattr("llamajax.corpus.tokenizing._BATCH_PARTS", 3)
    run(source, tmp_path / "many", *flags)
    shards = read_manifest(tmp_path / "many")["splits"]["train"]["shards"]
    assert len(shards) > 2
    assert shards[0]["file"] == f"train-00000-of-{len(shards):05d}.array_record"
    assert sum(s["tokens"] for s in shards) == len(stream(tmp_path / "one", "train")[0])
    assert blocks(tmp_path / "many", "train") == blocks(tmp_path / "one", "train")


def test_the_manifest_and_the_tokens(corpus, tmp_path):
    assert run(corpus, tmp_path / "out", "--validation_fraction=0.1", tokenizer="train:330") == 0
    manifest = read_manifest(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert manifest["tokenizer"]["vocab_size"] == tokenizer.vocab_size == 330
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    found, targets = [], {}
    for split, stats in manifest["splits"].items():
        tokens, starts = stream(tmp_path / "out", split)
        ends = [*starts[1:], len(tokens)]
        documents = [tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
        decoded = [tokenizer.decode(d[1:-1]) for d in documents]
        assert (len(decoded), len(tokens)) == (stats["documents"], stats["tokens"])
        assert sum(len(t.encode()) for t in decoded) == stats["text_bytes"]
        found += decoded
        targets[split] = collections.Counter(t for d in documents for t in d[1:])
    assert sorted(found) == sorted(texts)
    for split, counts in targets.items():
        total = sum(counts.values())
        entropy = -sum(c / total * math.log(c / total) for c in counts.values())
        assert manifest["splits"][split]["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)
    train, held = targets["train"], targets["validation"]
    smoothed = {t: math.log((train[t] + 1) / (sum(train.values()) + 330)) for t in held}
    loss = -sum(c * smoothed[t] for t, c in held.items()) / sum(held.values())
    assert manifest["splits"]["validation"]["unigram_loss"] == pytest.approx(loss, rel=1e-12)


def test_control_tokens_in_the_text_stay_text(tmp_path):
    (tmp_path / "evil.txt").write_text("<s>a</s><|begin_of_text|>\n\n" * 300)
    run(tmp_path / "evil.txt", tmp_path / "out", tokenizer="train:285")
    tokenizer = load_tokenizer(tmp_path / "out")
    tokens, _ = stream(tmp_path / "out", "train")
    assert [tokens.count(i) for i in (tokenizer.bos_id, tokenizer.eos_id)] == [1, 1]


def test_an_existing_output_is_replaced_only_with_overwrite(corpus, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    assert run(corpus, output) == 0
    before = contents(output)
    with pytest.raises(UserError, match="--overwrite"):
        run(corpus, output)
    (tmp_path / "short.txt").write_text("other words\n\n" * 30)
    assert run(tmp_path / "short.txt", output, "--overwrite") == 0
    assert contents(output) != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="was not written by prepare"):
        run(corpus, mine, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "corpus.jsonl", "mine", "out", "short.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("form", ["text", "instructions"])
def test_a_stopped_run_leaves_nothing_that_looks_finished(tmp_path, number, form):
    fifo = tmp_path / ("in.txt" if form == "text" else "in.jsonl")
    os.mkfifo(fifo)
    args = (f"--output={tmp_path / 'out'}", "--tokenizer=byte", f"--format={form}")
    process = warm.Popen(verb("prepare", f"--input={fifo}", *args), cwd=REPOSITORY)
    with process, fifo.open("w"):  # opens when the other side reads: it is at work
        process.send_signal(number)
        code = process.wait(timeout=60)
    left = {p.name for p in tmp_path.iterdir()} - {fifo.name}
    if number == signal.SIGKILL:
        assert left == {".out.partial", ".out.lock"}
    else:
        assert code == 143
        assert left == set()
    (tmp_path / "next.txt").write_text("words and words\n\n" * 50)
    assert run(tmp_path / "next.txt", tmp_path / "out") == 0
    assert {p.name for p in tmp_path.iterdir()} == {fifo.name, "next.txt", "out"}


def test_a_full_disk_is_the_users_to_fix(tmp_path):
    (tmp_path / "big.txt").write_text("many words\n\n" * 100_000)
    args = (f"--input={tmp_path / 'big.txt'}", f"--output={tmp_path / 'out'}", "--tokenizer=byte")
    limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "-", *verb("prepare", *args)]
    done = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"big.txt"}


def test_a_script_without_a_main_guard_can_prepare_and_imports_no_jax(corpus, tmp_path):
    script = tmp_path / "script.py"
    args = [f"--input={corpus}", f"--output={tmp_path / 'out'}", "--tokenizer=byte", "--workers=2"]
    script.write_text(
        f"import sys\nfrom llamajax import prepare\nprepare.main({args!r})\n"
        "print('once', {'jax', 'grain'} & set(sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("once") == done.stdout.count("once set()") == 1


def test_two_runs_into_one_output(corpus, tmp_path):
    fifo = tmp_path / "in.txt"
    os.mkfifo(fifo)
    args = (f"--input={fifo}", f"--output={tmp_path / 'out'}", "--tokenizer=byte")
    with warm.Popen(verb("prepare", *args), cwd=REPOSITORY) as process, fifo.open("w"):
        with pytest.raises(UserError, match="another prepare is writing it"):
            run(corpus, tmp_path / "out")
        process.terminate()
        process.wait(timeout=60)


LLAMA3 = "--format=instructions --chat_template=llama3"
MISTAKES = {
    "--tokenizer=none.model": "none.model: no such file",
    "--tokenizer=train:12": "260..",
    "--tokenizer=train:100000": "at most",
    "--workers=0": "at least 1",
    "--validation_fraction=1": r"0\.\.0\.5",
    "--validation_fraction=x": "validation_fraction=x: expected float",
    "--input=none.txt": "no such file",
    "--input=empty.txt": "no text in these files",
    "--input=blank.txt": "no text in these files",
    "--input=short.txt": "too little text",
    "--text_key=body": "no key 'body'",
    "--clean=html": r"expected none \| wikitext, got 'html'",
    "--format=chat": r"expected text \| instructions, got 'chat'",
    "--chat_template=llama2": "--format=text has no use for --chat_template",
    "--document_separator=x": r"is for \.txt files",
    "--document_separator=x --clean=wikitext": "wikitext has no use for --document_separator",
    "--format=instructions --text_key=a --clean=wikitext": "--text_key, --clean",
    "--format=instructions": r"(?s)first 10.*corpus.jsonl:10: neither messages, nor prompt",
    LLAMA3: "which this byte tokenizer lacks",
    f"{LLAMA3} --tokenizer=train:300": "which a tokenizer trained here lacks",
    "--beam_options=a=b --merge": "(?s)beam_options needs --runner=beam.*--merge need --num_tasks",
    "--runner=beam --task_index=0": "--runner=beam runs all tasks",
    "--task_index=0": "need --num_tasks",
    "--merge": "need --num_tasks",
    "--num_tasks=2": r"needs one of --task_index=0\.\.1 and --merge",
    "--num_tasks=2 --task_index=0 --merge": "needs one of",
    "--num_tasks=2 --task_index=2": r"must lie in 0\.\.1",
    "--num_tasks=0 --task_index=0": "must be at least 1",
    "--tokeniser=byte stray": "(?s)--tokeniser: unknown .* --tokenizer.*stray argument 'stray'",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(corpus, tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"empty": "", "blank": " \n\n", "short": "x"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=MISTAKES[flags]):
        run(corpus, tmp_path / "out", *flags.split())
    assert sorted(tmp_path.iterdir()) == before


BAD = ["{", "[1]", '{"body": "x"}', '{"text": null}', '{"text": "\\ud83d\\"}']


@pytest.mark.parametrize("tasks", [0, 2])
def test_bad_rows_are_listed_first_or_left_out_and_recorded(corpus, tmp_path, tasks, monkeypatch):
    """Bad rows after more documents than decide about the hold-out; a file that ends too early."""
    good = corpus.read_text() * 5
    clean, mixed = tmp_path / "clean", tmp_path / "mixed"
    for folder in (clean, mixed):
        folder.mkdir()
        (folder / "a.jsonl").write_text(good)
        (folder / "c.jsonl.gz").write_bytes(gzip.compress(good.encode()))
    (mixed / "a.jsonl").write_bytes((good + "\n".join(BAD * 3)).encode() + b'\n{"text": "\xff"}\n')
    (mixed / "c.jsonl").write_text('{"text": " \\n"}\n')
    (mixed / "b.jsonl.gz").write_bytes(gzip.compress(b"x")[:-4])
    calls = [["--num_tasks=2", f"--task_index={i}"] for i in range(tasks)]
    calls = [*calls, ["--num_tasks=2", "--merge"]] if tasks else [[]]
    with monkeypatch.context() as context:
        context.setattr("llamajax.corpus.preparation.tokenize_all", pytest.fail)
        context.setattr("llamajax.corpus.tasks.tokenize_all", pytest.fail)
        with pytest.raises(UserError, match=r"the first 10 problems.*on_error=skip") as raised:
            run(mixed, tmp_path / "out", *calls[0])
    named = [line.split(": ")[0] for line in str(raised.value).splitlines()[1:]]
    assert named == [f"  - {mixed / 'a.jsonl'}:{i}" for i in range(1501, 1511)]
    for flags in calls:
        run(mixed, tmp_path / "out", *flags, "--on_error=skip")
    run(clean, tmp_path / "clean_out")
    manifest, expected = read_manifest(tmp_path / "out"), read_manifest(tmp_path / "clean_out")
    assert manifest["splits"] == expected["splits"]
    assert manifest["left_out"]["rows"] == sum(manifest["left_out"]["reasons"].values()) == 17
    assert manifest["left_out"]["reasons"]["truncated or damaged"] == 1
    assert manifest["left_out"]["reasons"]["not valid JSON"] >= 3
    assert manifest["left_out"]["blank"] == 1
    assert [p.rpartition("/")[2].split(": ")[0] for p in manifest["left_out"]["first"]] == [
        f"a.jsonl:{i}" for i in range(1501, 1511)
    ]


def test_the_record_and_the_screen_name_what_was_left_out(corpus, tmp_path, capsys):
    chats = [{"messages": [{"role": "user"}]}, {"instruction": 1, "output": None}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ("--format=instructions", "--chat_template=llama2", "--on_error=skip")
    with pytest.raises(UserError, match="no text in these files"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert "bad.jsonl:1: message 1: no key 'content'" in said
    left_out = LeftOut()
    for problem in re.findall("  - (.*)", said):
        left_out.add(problem)
    assert left_out.reasons == {"no key 'content'": 1, "not a string": 1}
    corpus.write_text(corpus.read_text() + "nothing\n")
    run(corpus, tmp_path / "out", "--on_error=skip")
    said = capsys.readouterr()
    assert "1 row of --input is left out:\n  - " in said.err
    assert "left out    1 bad row of the input\n            - 1: not valid JSON\n" in said.out
    assert prepare.main([f"--inspect={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:-1]]
    assert "corpus.jsonl:301: not valid JSON" in shown
    splits = read_manifest(tmp_path / "out")["splits"]
    for name, stats in splits.items():
        assert f"{name:<11} {stats['documents']:,} documents, {stats['tokens']:,} tokens" in shown
        assert all(f"{s['file']}: {s['tokens']:,} tokens" in shown for s in stats["shards"])
    begins = re.findall(r"document +(?:with it|cut) +(.{10,20})", shown)
    assert len(begins) >= 6
    assert all(any(" ".join(text.split()).startswith(b) for text in texts) for b in begins)
    with pytest.raises(UserError, match=r"^--inspect=.*not a prepared directory"):
        prepare.main([f"--inspect={tmp_path}"])
    (tmp_path / "out" / "manifest.json").write_text('{"format_version": 1, "tokenizer": {}}')
    with pytest.raises(UserError, match="lacks input, splits"):
        prepare.main([f"--inspect={tmp_path / 'out'}"])


@pytest.mark.parametrize("chunk", [1 << 20, 5])
def test_plain_text_is_split_at_a_separator(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("llamajax.corpus.input_files.CHUNK", chunk)
    texts = ["one", "two\n<|", "", "thrée <|endoftext|", " \n", "last\n"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    flags = ("--document_separator=<|endoftext|>", "--validation_fraction=0")
    run(tmp_path / "a.txt", tmp_path / "out", *flags)
    tokens, starts = stream(tmp_path / "out", "train")
    documents = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    decoded = [load_tokenizer("byte").decode(document) for document in documents]
    assert decoded == [text for text in texts if text.strip()]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("tokenizer", ["byte", "train:330"])
def test_a_long_text_is_read_in_chunks_and_cut_where_that_changes_nothing(
    tmp_path, kind, tokenizer, monkeypatch
):
    """Escapes, halves of pairs and characters of several bytes fall on the chunks' ends."""
    rng = np.random.default_rng(3)
    words = [*WORDS, '"', "\\", "\\\\", "🦙", "\u2028", "é" * 9, "\r\n", "\n\n"]
    text = " ".join(rng.choice(words, 6000))
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_bytes(text.encode())
    elif kind == "jsonl":
        lines = [json.dumps({"n": i, "text": text}, ensure_ascii=i == 0) for i in range(2)]
        path.write_text("\n".join(lines))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [text, "b"]}), path)
    run(path, tmp_path / "one", tokenizer=tokenizer)
    for name, size in [("long_text.LONG_CHARS", 900), ("json_values.LONG_CHARS", 900),
                       ("long_text.CHUNK", 7),
                       ("input_files.CHUNK", 7), ("tokenizing._PIECE_CHARS", 50)]:  # fmt: skip
        monkeypatch.setattr(f"llamajax.corpus.{name}", size)
    run(path, tmp_path / "many", tokenizer=tokenizer)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    run(path, tmp_path / "tasks", "--num_tasks=1", "--task_index=0", tokenizer=tokenizer)
    run(path, tmp_path / "tasks", "--num_tasks=1", "--merge", tokenizer=tokenizer)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "one")


def test_a_text_without_a_safe_cut_is_cut_and_that_is_said(tmp_path, monkeypatch, capsys):
    for name in ("_PIECE_CHARS", "_MAX_PIECE_CHARS"):
        monkeypatch.setattr(f"llamajax.corpus.tokenizing.{name}", 1000)
    monkeypatch.setattr("llamajax.tokenizers.tokenizer.ByteTokenizer.safe_cut", lambda *_: None)
    (tmp_path / "a.txt").write_text("x" * 3500)
    run(tmp_path / "a.txt", tmp_path / "out", "--validation_fraction=0")
    assert "warning: 3 cuts within texts of which" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out")["left_out"] == {"unsafe_cuts": 3}
    assert stream(tmp_path / "out", "train") == ([256, *b"x" * 3500, 257], [0])


@pytest.mark.parametrize(
    ("source", "tokenizer", "tokens"),
    [
        ("state_of_the_union.jsonl.gz", "llama2", 2_710_278),
        ("austen.txt.gz", "llama3", 958_508),
    ],
)
def test_the_real_texts_with_the_real_tokenizers(assets, tmp_path, source, tokenizer, tokens):
    model = assets / "tokenizers" / f"{tokenizer}.model"
    assert run(assets / "text" / source, tmp_path / "out", tokenizer=str(model)) == 0
    splits = read_manifest(tmp_path / "out")["splits"]
    assert sum(s["tokens"] for s in splits.values()) == tokens


def test_a_worker_that_dies_is_one_message(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("llamajax.corpus.tokenizing._BATCH_CHARS", 5_000)
    monkeypatch.setattr("llamajax.corpus.tokenizing._WORKER", "raise SystemExit(3)")
    with pytest.raises(UserError, match="a tokenizer process ended with code 3"):
        run(corpus, tmp_path / "out", "--workers=2")
    assert {p.name for p in tmp_path.iterdir()} == {"corpus.jsonl"}
