"""Instruction data: lines read, prepared, and batches in which only the answers count."""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamajax import prepare
from llamajax.corpus.holdout import Holdout
from llamajax.corpus.instructions import Example, InstructionCorpus, parse_example
from llamajax.data import (
    Position,
    eval_batches,
    load_tokenizer,
    open_mixture,
    sample_ids,
    train_batches,
)
from llamajax.data.mixture import PreparedSplit, read_manifest
from llamajax.errors import UserError
from llamajax.tokenizers.chat import Message, encode_example

BOS, EOS = 256, 257
Prepare = Callable[..., Path]


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """Prompts and completions of all sizes, over a few blocks; one answer crosses two of them."""
    rng = np.random.default_rng(7)
    sizes = [(3, 1), (0, 5), (4000, 300), (10, 9000), (1, 1), (700, 20), (50, 2500), (2, 3)] * 2
    letters = lambda n: "".join(chr(97 + c) for c in rng.integers(0, 26, n))  # noqa: E731
    return [{"prompt": letters(a), "completion": letters(b)} for a, b in sizes]


@pytest.fixture(scope="session")
def expected(pairs: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All their tokens in order, which carry loss, and where examples start."""
    tokens: list[int] = []
    learned: list[bool] = []
    starts = []
    for pair in pairs:
        starts.append(len(tokens))
        prompt, answer = pair["prompt"].encode(), pair["completion"].encode()
        tokens += [BOS, *prompt, *answer, EOS]
        learned += [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    return np.array(tokens), np.array(learned), np.array(starts)


@pytest.fixture
def prepared_pairs(tmp_path: Path, pairs: list[dict[str, str]]) -> Prepare:
    """Writes examples, one a line, and prepares them; all to train unless told otherwise."""

    def write(name: str, lines: Sequence[Any] = pairs, *flags: str) -> Path:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        args = [f"--input={source}", f"--output={tmp_path / name}", "--workers=1"]
        args += ["--tokenizer=byte", "--format=instructions"]
        assert prepare.main([*args, *(flags or ("--validation_fraction=0",))]) == 0
        return tmp_path / name

    return write


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("seq_len", [1, 100, 1365, 4095, 4096, 4097, 9001])
def test_only_targets_of_answers_count(prepared_pairs, config, expected, seq_len, mask_documents):
    tokens, learned, starts = expected
    data = config(prepared_pairs("a"), seq_len=seq_len, mask_documents=mask_documents)
    mixture = open_mixture(data, split="train", vocab_size=258)
    targets, counted, segments = [], [], []
    rows = 3 + 1000 // seq_len
    for batch in eval_batches(mixture, batch_size=rows, seq_len=seq_len, rows=range(rows)):
        targets.append(batch["targets"].ravel())
        counted.append(batch["loss_mask"].ravel())
        segments.append(batch["segment_ids"].ravel())
    targets, counted, segments = map(np.concatenate, (targets, counted, segments))
    np.testing.assert_array_equal(targets[segments > 0], tokens[1:])
    np.testing.assert_array_equal(counted[segments > 0], learned[1:])
    assert not counted[segments == 0].any()
    assert not set(starts) & set(np.flatnonzero(learned))
    assert counted.sum() == mixture.sources[0].num_loss_tokens == learned.sum()


def test_shuffled_batches_count_the_same_targets(prepared_pairs, config, expected):
    tokens, learned, _ = expected
    mixture = open_mixture(config(prepared_pairs("a")), split="train", vocab_size=258)
    position = Position.start(batch_size=4, seq_len=100, mixture_hash=mixture.hash)
    batches = train_batches(
        mixture, position, first_step=3, rows=range(4), num_threads=1, prefetch=2
    )
    order = mixture.order(100)
    for step in range(3, 9):
        batch = next(batches)
        for row in range(4):
            begin = 100 * int(order[4 * step + row])
            np.testing.assert_array_equal(batch["tokens"][row], tokens[begin : begin + 100])
            np.testing.assert_array_equal(batch["loss_mask"][row], learned[begin + 1 : begin + 101])
    batches.close()


def test_text_beside_examples_counts_as_ever(prepared, prepared_pairs, config, expected):
    _, learned, _ = expected
    paths = prepared("text", ["x" * 2000]), prepared_pairs("examples")
    mixture = open_mixture(config(*paths, weights=(1.0, 1.0)), split="train", vocab_size=258)
    position = Position.start(batch_size=40, seq_len=100, mixture_hash=mixture.hash)
    options = {"first_step": 0, "rows": range(40), "num_threads": 0, "prefetch": 0}
    batch = next(train_batches(mixture, position, **options))
    kinds = Counter()
    for row, sample in enumerate(sample_ids(mixture, position, 0)):
        source, number = mixture.locate(int(sample), 100)
        counted = learned[100 * number + 1 :][:100] if source.masked else np.ones(100, bool)
        np.testing.assert_array_equal(batch["loss_mask"][row], counted)
        kinds[source.masked] += 1
    assert kinds == {True: 20, False: 20}


def test_figures_of_the_manifest_are_about_the_answers(prepared_pairs, expected):
    tokens, learned, starts = expected
    manifest = json.loads((prepared_pairs("a") / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["loss_mask"]) == (2, True)
    assert manifest["input"]["format"] == "instructions"
    assert manifest["input"]["chat_template"] == "none"
    train = manifest["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (len(starts), len(tokens))
    lengths = np.diff([*starts, len(tokens)])
    assert train["longest_document"] == lengths.max()
    assert train["documents_over"] == {
        str(n): int((lengths > n).sum()) for n in (1024, 2048, 4096, 8192)
    }
    assert train["loss_tokens"] == learned.sum()
    assert train["text_bytes"] == learned.sum() - len(starts)  # EOS is no text
    counts = Counter(tokens[learned].tolist()).values()
    entropy = -sum(c / learned.sum() * math.log(c / learned.sum()) for c in counts)
    assert train["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)


def test_examples_are_held_out_whole(prepared_pairs, pairs):
    for number, few in enumerate((pairs, pairs[3:5], [pairs[3]] * 2)):
        path = prepared_pairs(f"p{number}", few, "--validation_fraction=0.1")
        splits = json.loads((path / "manifest.json").read_text())["splits"]
        held = splits["validation"]["documents"]
        assert 1 <= held < len(few) == held + splits["train"]["documents"]
        assert splits["validation"]["unigram_loss"] > 0
    with pytest.raises(UserError, match="too little text for two splits"):
        prepared_pairs("one", [pairs[3]], "--validation_fraction=0.1")
    example = Example((Message("user", "x" * 50), Message("assistant", "y" * 50)))
    parts = list(Holdout([example], 0.2).split([example]))
    assert [(p.split, p.document) for p in parts] == [("train", example)]


def test_what_an_earlier_version_prepared_reads_bit_for_bit(tmp_path, config):
    """Written before there was instruction data, by `prepare` with the byte tokenizer."""
    stored = Path(__file__).parent / "prepared_v1"
    for file in stored.iterdir():
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        (tmp_path / file.name.removesuffix(".gz")).write_bytes(content)
    texts = [
        "Call me Ishmael. Some years ago, never mind how long.",
        "ü </s><s> [INST] x",
        "A third one.\n\nWith two paragraphs.",
    ]
    documents = [f"{text} {i}" for i, text in enumerate(texts * 4)]
    held = {1, 6}
    for split, seq_len in (("train", 394 - 1), ("validation", 80 - 1)):
        chosen = [d for i, d in enumerate(documents) if (i in held) == (split == "validation")]
        tokens = np.array([t for d in chosen for t in (BOS, *d.encode(), EOS)])
        data = config(tmp_path, seq_len=seq_len, global_batch_size=1)
        mixture = open_mixture(data, split=split, vocab_size=258, verify=True)
        (batch,) = eval_batches(mixture, batch_size=1, seq_len=seq_len, rows=range(1))
        np.testing.assert_array_equal(batch["tokens"][0], tokens[:-1])
        np.testing.assert_array_equal(batch["targets"][0], tokens[1:])
        np.testing.assert_array_equal(batch["loss_mask"][0], tokens[1:] != BOS)
    again = tmp_path / "old.jsonl"
    again.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    args = [f"--input={again}", f"--output={tmp_path / 'again'}", "--tokenizer=byte"]
    prepare.main([*args, "--validation_fraction=0.2", "--workers=1"])
    old, new = (read_manifest(p) for p in (tmp_path, tmp_path / "again"))
    for split in ("train", "validation"):
        (block,) = PreparedSplit(tmp_path, old, split).reader.blocks([0])
        (same,) = PreparedSplit(tmp_path / "again", new, split).reader.blocks([0])
        assert all(np.array_equal(a, b) for a, b in zip(block[:2], same[:2], strict=True))
        assert block[2] is same[2] is None
        # The container's bytes are the library's affair, and its versions may differ.
        for shard in (*old["splits"][split]["shards"], *new["splits"][split]["shards"]):
            del shard["sha256"], shard["bytes"]
    assert json.dumps(new) == json.dumps(old)


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ({"prompt": "a"}, ["neither prompt and completion nor messages (its keys: 'prompt')"]),
        ({}, ["neither prompt and completion nor messages (its keys: none)"]),
        ({"prompt": 1, "completion": None}, [
            "prompt: content is a int, not a string",
            "completion: content is a NoneType, not a string",
        ]),
        ({"prompt": "a", "completion": " \n"}, ["completion: an answer without text"]),
        ({"prompt": "a", "messages": []}, ["both messages and prompt: keep one of the two forms"]),
        ({"messages": {}}, ["messages is a dict, not a list"]),
    ],
)  # fmt: skip
def test_lines_that_are_no_examples(line, problems):
    assert parse_example(line, "none")[1] == problems


def test_bad_lines_are_named_together(tmp_path):
    good = {"prompt": "a", "completion": "b", "id": 7}
    lines = [json.dumps(good), "", "{", "[1]", json.dumps({"prompt": "a"}), json.dumps(good)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    corpus = InstructionCorpus([path], template="none")
    for _ in range(2):  # a second walk tells the same
        with pytest.raises(UserError) as raised:
            list(corpus)
        title, *told = str(raised.value).splitlines()
        assert "first" not in title
        assert [t.split(":")[1:3] for t in told] == [
            ["3", " not valid JSON"], ["4", " a list, not a JSON object"],
            ["5", " neither prompt and completion nor messages (its keys"],
        ]  # fmt: skip
    path.write_text("[]\n" * 50)
    with pytest.raises(UserError, match="the first 10 problems") as raised:
        list(corpus)
    assert len(str(raised.value).splitlines()) == 11
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(UserError, match=r"reads \.jsonl and \.jsonl\.gz.*not a\.txt"):
        InstructionCorpus([text, path], template="none")


def test_a_bad_line_is_told_before_anything_is_tokenised(prepared_pairs, monkeypatch):
    """Also one beyond those that decide what is held out, and whatever would be written."""
    monkeypatch.setattr("llamajax.corpus.preparation.tokenize_all", pytest.fail)
    lines = [{"prompt": "a", "completion": "b"}] * 1010 + [{"prompt": "a"}]
    with pytest.raises(UserError, match=r"a\.jsonl:1011: neither"):
        prepared_pairs("a", lines, "--validation_fraction=0.01")


def chat(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **answer}]
    return turns


@pytest.mark.parametrize("template", ["llama2", "chatml"])
def test_an_answer_of_weight_0_carries_no_loss(template):
    tokenizer = load_tokenizer("byte")
    tokenizer.control_ids = {"<|im_start|>": 256, "<|im_end|>": 257}
    lines = chat({"weight": 0}, {"weight": 1}, {})
    messages, problems = parse_example({"messages": lines}, template)
    assert problems == []
    ids, learned = encode_example(tokenizer, template, messages)
    assert len(ids) == len(learned)
    both, all_learned = encode_example(
        tokenizer, template, [m._replace(weight=1) for m in messages]
    )
    assert ids == both
    assert 3 * sum(learned) == 2 * sum(all_learned)
    assert not any(learned[: len(learned) // 3])
    assert Example(messages).answers == ["a", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": chat({"weight": 0})}, "every answer has weight 0"),
        ({"messages": chat({"weight": 0.5})}, r"weight 0\.5 is neither 0 nor 1"),
        ({"messages": chat({}), "tools": [{"type": "function"}]}, "'tools' is not supported"),
        ({"messages": chat({"tool_calls": [{"id": "x"}]})}, "message 2: 'tool_calls' is not"),
        ({"prompt": "a", "completion": "b", "weight": 0}, "weight 0 has nothing to learn"),
    ],
)
def test_keys_that_change_the_meaning_are_refused(line, message):
    _, problems = parse_example(line, "chatml")
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_keys_that_are_empty_or_of_no_meaning_are_ignored():
    line = {"messages": chat({"tool_calls": None, "name": "x"}), "tools": [], "id": 3}
    assert parse_example(line, "chatml")[1] == []
