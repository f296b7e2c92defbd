"""Instruction data: lines read, prepared, and batches in which only the answers count."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from old_run import unpack_data
from refusal import refused
from workdirs import inputs, prepare_options, prepare_texts, write_rows

from llamajax.corpus.holdout import Holdout
from llamajax.corpus.instructions import Example, InstructionCorpus, parse_example
from llamajax.data import Position, eval_batches, load_tokenizer, sample_ids, train_batches
from llamajax.data.packing import EXAMPLES, WINDOWS
from llamajax.data.prepared_split import PreparedSplit, read_manifest
from llamajax.errors import UserError
from llamajax.tokenizers.chat import Message, encode_example

BOS, EOS = 256, 257


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """Prompts and completions of all sizes, over a few blocks; one answer crosses two of them."""
    rng = np.random.default_rng(7)
    sizes = [(3, 1), (0, 5), (4000, 300), (10, 9000), (1, 1), (700, 20), (50, 2500), (2, 3)] * 2

    def letters(n: int) -> str:
        return "".join(chr(97 + c) for c in rng.integers(0, 26, n))

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
def prepared_pairs(prepared, pairs) -> Callable[..., Path]:
    """Prepare examples."""

    def write(name: str, lines: Sequence[Any] = pairs, *flags: str) -> Path:
        return prepared(name, lines, "--format=instructions", *flags)

    return write


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("seq_len", [1, 100, 1365, 4095, 4096, 4097, 9001])
def test_only_targets_of_answers_count(prepared_pairs, opened, expected, seq_len, mask_documents):
    tokens, learned, starts = expected
    mixture = opened(prepared_pairs("a"), seq_len=seq_len, mask_documents=mask_documents)
    rows = 3 + 1000 // seq_len
    sizes = {"batch_size": rows, "seq_len": seq_len, "rows": range(rows)}
    batches = list(eval_batches(mixture, packing=WINDOWS, **sizes))
    targets, counted, segments = (
        np.concatenate([batch[name].ravel() for batch in batches])
        for name in ("targets", "loss_mask", "segment_ids")
    )
    np.testing.assert_array_equal(targets[segments > 0], tokens[1:])
    np.testing.assert_array_equal(counted[segments > 0], learned[1:])
    assert not counted[segments == 0].any()
    assert not set(starts) & set(np.flatnonzero(learned))
    assert counted.sum() == mixture.sources[0].num_loss_tokens == learned.sum()


def test_shuffled_batches_count_the_same_targets_and_all_of_text_beside_them(
    prepared, prepared_pairs, opened, expected
):
    tokens, learned, _ = expected
    paths = prepared("text", ["x" * 2000]), prepared_pairs("examples")
    mixture = opened(*paths, weights=(1.0, 1.0))
    position = Position.start(
        batch_size=40, seq_len=100, mixture_hash=mixture.hash, packing=WINDOWS
    )
    batches = train_batches(
        {mixture.hash: mixture}, position, first_step=3, rows=range, num_threads=1, prefetch=2
    )
    for step in range(3, 6):
        batch, kinds = next(batches), Counter()
        for row, sample in enumerate(sample_ids(mixture, position, step)):
            source, number, _ = mixture.locate(int(sample), 100, WINDOWS)
            counted = np.ones(100, bool)
            if source.masked:
                begin = 100 * number
                np.testing.assert_array_equal(batch["tokens"][row], tokens[begin : begin + 100])
                counted = learned[begin + 1 : begin + 101]
            np.testing.assert_array_equal(batch["loss_mask"][row], counted)
            kinds[source.masked] += 1
        assert kinds == {True: 20, False: 20}
    batches.close()


def test_figures_of_the_manifest_are_about_the_answers(prepared_pairs, expected):
    tokens, learned, starts = expected
    manifest = read_manifest(prepared_pairs("a"))
    assert (manifest["format_version"], manifest["loss_mask"]) == (2, True)
    assert manifest["input"]["format"] == "instructions"
    assert manifest["input"]["chat_template"] == "none"
    train = manifest["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (len(starts), len(tokens))
    lengths = np.diff([*starts, len(tokens)])
    assert train["longest_document"] == lengths.max()
    assert train["loss_tokens"] == learned.sum()
    assert train["text_bytes"] == learned.sum() - len(starts)  # EOS is no text
    counts = Counter(tokens[learned].tolist()).values()
    entropy = -sum(c / learned.sum() * math.log(c / learned.sum()) for c in counts)
    assert train["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)


def test_examples_are_held_out_whole(prepared_pairs, pairs):
    for number, few in enumerate((pairs, pairs[3:5], [pairs[3]] * 2)):
        path = prepared_pairs(f"p{number}", few, "--validation_fraction=0.1")
        splits = read_manifest(path)["splits"]
        held = splits["validation"]["documents"]
        assert 1 <= held < len(few) == held + splits["train"]["documents"]
        assert splits["validation"]["unigram_loss"] > 0
    with pytest.raises(UserError, match="too little text for two splits"):
        prepared_pairs("one", [pairs[3]], "--validation_fraction=0.1")
    example = Example((Message("user", "x" * 50), Message("assistant", "y" * 50)))
    parts = list(Holdout([len(example)], 0.2, whole=True).split([example]))
    assert [(p.split, p.document) for p in parts] == [("train", example)]


def test_data_of_an_earlier_version_reads_bit_for_bit(tmp_path, opened):
    """`prepared_v1` was written before there was instruction data, with the byte tokenizer."""
    old_data = unpack_data(tmp_path / "old")
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
        mixture = opened(old_data, split=split, seq_len=seq_len)
        (batch,) = eval_batches(
            mixture, batch_size=1, seq_len=seq_len, packing=EXAMPLES, rows=range(1)
        )
        np.testing.assert_array_equal(batch["tokens"][0], tokens[:-1])
        np.testing.assert_array_equal(batch["targets"][0], tokens[1:])
        np.testing.assert_array_equal(batch["loss_mask"][0], tokens[1:] != BOS)
    new_data = prepare_texts(tmp_path, documents, held_out=0.2)
    old, new = map(read_manifest, (old_data, new_data))
    for split in ("train", "validation"):
        (block,) = PreparedSplit(old_data, old, split).blocks([0])
        (same,) = PreparedSplit(new_data, new, split).blocks([0])
        assert all(np.array_equal(a, b) for a, b in zip(block[:2], same[:2], strict=True))
        assert block.answer is same.answer is None
        # The container's bytes are the library's affair, and its versions may differ.
        for shard in (*old["splits"][split]["shards"], *new["splits"][split]["shards"]):
            del shard["sha256"], shard["bytes"]
        for name in ("used_tokens", "copies", "copies_estimated"):  # not counted then
            del new["splits"][split][name]
    names = [manifest["input"].pop("files") for manifest in (old, new)]
    assert names == [["old.jsonl"], ["corpus.jsonl"]]
    assert json.dumps(new) == json.dumps(old)


def chat(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for answer in answers:
        turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **answer}]
    return turns


ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
LAYOUTS = [
    ({"conversations": SHAREGPT, "id": "x", "tools": "[]"}, [ASK, TELL]),
    ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT]}, [SYSTEM, ASK, TELL]),
    ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, ASK, TELL]),
    ({"conversations": [ASK, TELL], "system": ""}, [ASK, TELL]),
    ({"instruction": "q", "input": "", "output": "a", "text": "as a prompt"}, [ASK, TELL]),
    ({"instruction": "q", "output": "a", "system": "s"}, [SYSTEM, ASK, TELL]),
    ({"instruction": "x", "input": "y", "output": "a"}, [{**ASK, "content": "x\n\ny"}, TELL]),
    ({"messages": [ASK, TELL], "prompt": "q", "prompt_id": "1"}, [ASK, TELL]),  # as UltraChat
    ({"messages": [ASK, TELL], "prompt": None, "completion": None}, [ASK, TELL]),
]  # fmt: skip


# As in LLaMA-Factory's data/glaive_toolcall_en_demo.json.
AREA = {"name": "area", "description": "of a shape", "parameters": {"type": "object"}}
AREA_CALL = {"name": "area", "arguments": {"shape": "square", "sizes": [5, 5]}}
TOOL_TURNS = [
    SHAREGPT[0], {"from": "function_call", "value": json.dumps(AREA_CALL)},
    {"from": "observation", "value": '{"area": 25}'}, SHAREGPT[1],
]  # fmt: skip


@pytest.mark.parametrize("tools", [[AREA], [{"type": "function", "function": AREA}], []])
def test_tools_of_sharegpt_are_those_of_openais_form(tools):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": AREA_CALL}]}
    result = {"role": "tool", "content": '{"area": 25}'}
    theirs = {"conversations": TOOL_TURNS, "tools": json.dumps(tools), "system": "s"}
    openai = {"messages": [SYSTEM, ASK, call, result, TELL]}
    openai["tools"] = [{"type": "function", "function": AREA}] if tools else []
    found = parse_example(theirs, "llama3.1")
    assert found == parse_example(openai, "llama3.1")
    assert found[1] == []
    for wrong, problem in {
        "{": "message 3: its call has no function with a name",
        json.dumps([AREA_CALL] * 2): "message 3: tool_calls is no list of one call: llama3.1 has",
    }.items():
        turns = [TOOL_TURNS[0], TOOL_TURNS[1] | {"value": wrong}, *TOOL_TURNS[2:]]
        _, (said,) = parse_example(theirs | {"conversations": turns}, "llama3.1")
        assert said.startswith(problem)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_layouts_of_others_in_every_container(tmp_path, kind):
    """In columns each row has all keys of the others, null where it had none."""
    for number, (row, expected) in enumerate(LAYOUTS):
        path, rows = tmp_path / f"{number}.{kind}", [row, {**row, "weight": 1}]
        if kind == "jsonl":
            write_rows(path, *rows)
        elif kind == "json":
            path.write_text(json.dumps(rows))
        else:
            table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(rows[::-1]).schema)
            if kind == "parquet":
                pa.parquet.write_table(table, path)
            else:
                with pa.ipc.new_stream(path, table.schema) as writer:
                    writer.write_table(table)
        corpus = InstructionCorpus(inputs(path), prepare_options(chat_template="chatml"))
        read = [[(m.role, m.content) for m in example.messages] for example in corpus]
        assert read == [[tuple(message.values()) for message in expected]] * 2


def test_bad_rows_of_columns_are_named_and_files_of_other_columns(tmp_path):
    rows = [{"messages": chat({})}, {"messages": None}, {"messages": [{"role": "user"}]}]
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    with refused(
        "a.parquet: row 2: neither messages, nor prompt and completion",
        "a.parquet: row 3: message 1: no key 'content'",
    ):
        list(InstructionCorpus(inputs(path), prepare_options(chat_template="chatml")).check())
    pa.parquet.write_table(pa.table({"question": ["q"]}), path)
    with refused("a.parquet: has the columns question, but no column of an example"):
        list(InstructionCorpus(inputs(path), prepare_options()).check())


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ({"conversations": SHAREGPT, "instruction": "q", "output": "a"}, [
            "has conversations, as well as instruction and output: keep one of these forms",
        ]),
        ({"conversations": [{"from": "tool", "value": "q"}]}, ["message 1: role 'tool' is none"]),
        ({"conversations": [{"from": ["x"], "value": "q"}]}, [r"message 1: role .*x.* is none"]),
        ({"conversations": []}, ["conversations is empty"]),
        ({"conversations": TOOL_TURNS}, [
            "message 2: 'tool_calls' is not supported: --chat_template=llama3.1 writes it",
            "message 3: role 'tool' is none of .*; --chat_template=llama3.1 writes those of tools",
        ]),
        ({"conversations": [1]}, ["message 1: a int, not an object"]),
        ({"instruction": 1, "output": None}, ["instruction and output: not a string"]),
        ({"instruction": "q", "output": " "}, ["message 2: an answer without text"]),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, ["'history' is not"]),
        ({"prompt": "a"}, [r"neither messages, nor prompt and .* \(its keys: 'prompt'\)"]),
        ({}, [r"neither messages, .* \(its keys: none\)"]),
        ({"prompt": 1, "completion": None}, [
            "prompt: content is of type int, not a string",
            "completion: content is of type NoneType, not a string",
        ]),
        ({"prompt": "a", "completion": " \n"}, ["completion: an answer without text"]),
        ({"prompt": "a", "completion": "b", "messages": chat({})}, [
            "has messages, as well as prompt and completion: keep one of these forms",
        ]),
        ({"messages": {}}, ["messages is of type dict, not a list"]),
        ({"messages": chat({"weight": 0})}, ["every answer has weight 0"]),
        ({"messages": chat({"weight": 0.5})}, [r"message 2: weight 0\.5 is neither 0 nor 1"]),
        ({"messages": chat({}), "tools": [{"type": "function"}]}, ["'tools' is not supported"]),
        ({"messages": chat({"tool_calls": [{"id": "x"}]})}, ["message 2: 'tool_calls' is not"]),
        ({"prompt": "a", "completion": "b", "weight": 0}, [".*weight 0 has nothing to learn"]),
        # Keys that are empty or without meaning:
        ({"messages": chat({"tool_calls": None, "name": "x"}), "tools": [], "id": 3}, []),
    ],
)  # fmt: skip
def test_lines_that_are_no_examples(line, problems):
    _, found = parse_example(line, "chatml")
    assert len(found) == len(problems)
    assert all(map(re.match, problems, found))


def test_bad_lines_are_named_together(tmp_path):
    good = {"prompt": "a", "completion": "b", "id": 7}
    lines = [json.dumps(good), "", "{", "[1]", json.dumps({"prompt": "a"}), json.dumps(good)]
    path, text = tmp_path / "x.jsonl", tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    corpus = InstructionCorpus(inputs(path), prepare_options())
    with refused() as said:
        list(corpus.check())
    assert "first" not in said[0]
    assert [line.split(":")[1:3] for line in said[1:]] == [
        ["3", " not valid JSON"], ["4", " of type list, not a JSON object"],
        ["5", " neither messages, nor prompt and completion, nor conversations, nor "
         "instruction and output (its keys"],
    ]  # fmt: skip
    text.write_text("x")
    with pytest.raises(UserError, match=r"reads \.jsonl, .*not a\.txt.*data\.path="):
        InstructionCorpus(inputs(text, path), prepare_options())


@pytest.mark.parametrize("template", ["llama2", "chatml"])
def test_an_answer_of_weight_0_carries_no_loss(template):
    tokenizer = load_tokenizer("byte")
    control = {"<|im_start|>": 256, "<|im_end|>": 257}
    tokenizer.special = dataclasses.replace(tokenizer.special, control_ids=control)
    lines = chat({"weight": 0}, {"weight": 1}, {})
    messages, problems = parse_example({"messages": lines}, template)
    assert problems == []
    ids, learned = encode_example(tokenizer, template, messages)
    whole = [m._replace(weight=1) for m in messages]
    all_ids, all_learned = encode_example(tokenizer, template, whole)
    assert ids == all_ids
    assert len(ids) == len(learned)
    assert 3 * sum(learned) == 2 * sum(all_learned)
    assert not any(learned[: len(learned) // 3])
    assert Example(messages).answers == ["a", "a"]
