"""Tasks: what rows of a file mean, how they are encoded and cut, and their scores when packed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from meshes import mesh_of
from test_scoring import CONFIG, IDS, TOLERANCE, losses_alone, model
from tiny_model import COMPUTE

from llamajax import sharding
from llamajax.errors import UserError
from llamajax.evaluation.continuations import Continuation, ContinuationRows, packed_length
from llamajax.evaluation.scoring import rows_a_batch, score, token_scores
from llamajax.evaluation.task_files import encode_continuation, open_tasks
from llamajax.tokenizers import load_tokenizer

CHOICES = ["blue", "1", "red"]
ANSWERS = {0: 0, 2: 2, "2": 2, "B": 1, " C ": 2, "blue": 0, "1": 1}
MISTAKES = {
    "[]": "of type list, not a JSON object",
    "{'question'": "not valid JSON",
    '{"choices": ["a", "b"], "answer": 0}': "has no question",
    '{"question": "q", "answer": 0}': "has no choices",
    '{"question": "q", "choices": ["a", "b"]}': "has no answer",
    '{"question": "q", "ctx": "c", "choices": ["a", "b"], "answer": 0}': "has question and ctx",
    '{"question": 7, "choices": ["a", "b"], "answer": 0}': "the question must be a text, not 7",
    '{"question": "q", "choices": ["a"], "answer": 0}': "at least two texts",
    '{"question": "q", "choices": ["a", " "], "answer": 0}': "not empty, not ' '",
    '{"question": "q", "choices": ["a", "b"], "answer": 2}': "2 names none of 2 choices",
    '{"question": "q", "choices": ["a", "b"], "answer": -1}': "-1 names none",
    '{"question": "q", "choices": ["a", "b"], "answer": true}': "True names none",
    '{"question": "q", "choices": ["a", "b"], "answer": "c"}': "'c' names none",
    '{"question": "q", "choices": {"text": ["a", "b"], "label": [1, 2]}, "answer": 0}': "0 names",
    '{"question": "q", "choices": {"text": ["a", "b"], "label": [1]}, "answer": 1}': "a label each",
    '{"question": "q", "choices": ["B", "b"], "answer": "B"}': r"'B' names choices \[0, 1\]",
}


@pytest.fixture
def task_file(tmp_path):
    def write(*lines: str):
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        return [str(tmp_path / "t.jsonl")]

    return write


def opened(paths, seq_len=64):
    return open_tasks(paths, load_tokenizer("byte"), seq_len=seq_len, label="--tasks")


@pytest.mark.parametrize("answer", ANSWERS, ids=repr)
def test_spellings_of_an_answer(task_file, answer):
    row = {"question": "q", "choices": CHOICES, "answer": answer}
    (question,) = opened(task_file(json.dumps(row))).questions["t"]
    assert question.answer == ANSWERS[answer]


@pytest.mark.parametrize("labels", [["1", "2", "3"], [1, 2, 3]], ids=repr)
@pytest.mark.parametrize("answer", [1, "1", " 1 "], ids=repr)
def test_labels_are_names_of_choices(task_file, labels, answer):
    row = {"question": "q", "choices": {"text": CHOICES, "label": labels}, "answerKey": answer}
    (question,) = opened(task_file(json.dumps(row))).questions["t"]
    assert (question.choices, question.answer) == (tuple(CHOICES), 0)


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_name_their_line(task_file, line):
    good = '{"question": "q", "choices": ["a", "b"], "answer": 0}'
    with pytest.raises(UserError, match=f"(?s)--tasks: .*line 3: .*{MISTAKES[line]}"):
        opened(task_file(good, "", line))


def test_long_questions_lose_their_beginning(task_file):
    row = {"question": "abcdefgh", "choices": ["x", "yz"], "answer": 0}
    tasks = opened(task_file(json.dumps(row), json.dumps(row | {"question": "a"})), seq_len=9)
    tokenizer = load_tokenizer("byte")
    texts = [tokenizer.decode(each.ids.tolist()) for each in tasks.encoded]
    assert texts == ["abcdefgh x"[-10:], "bcdefgh yz", "a x", "a yz"]
    assert [each.is_cut for each in tasks.encoded] == [True, True, False, False]
    (line,) = tasks.warnings()
    assert line.startswith("task t: 1 of 2 questions are longer")


def test_a_loss_that_is_not_finite_is_no_answer(task_file):
    row = {"question": "q", "choices": ["x", "yz"], "answer": 0}
    tasks = opened(task_file(*[json.dumps(row)] * 2))
    figures = tasks.results(np.array([1.0, 2.0, 1.0, np.nan]))["t"]
    assert (figures["accuracy"], figures["accuracy_by_length"]) == (0.5, 0.5)
    figures = tasks.results(np.full(4, np.nan))["t"]
    assert (figures["accuracy"], figures["accuracy_by_length"]) == (0, 0)
    assert np.isnan(figures["bits_per_byte"])


def test_white_space_before_a_continuation_is_part_of_it():
    tokenizer = load_tokenizer("byte")
    first = tokenizer.start_ids
    assert encode_continuation(tokenizer, "ab", " c") == ([*first, *b"ab c"], 2)
    assert encode_continuation(tokenizer, "ab \n", "c") == ([*first, *b"ab \nc"], 3)
    ids, count = encode_continuation(tokenizer, "", "c")
    assert (ids[1:], count) == ([*b"c"], 1), "something is before the first token"


def alone(found: list[Continuation]) -> list[float]:
    return [losses_alone(each.ids, each.num_targets).sum() for each in found]


@pytest.mark.parametrize(
    ("shape", "packed"),
    [({}, True), ({}, False), ({"stage": 2, "fsdp": 2, "tensor": 2}, True), ({"data": 8}, True)],
    ids=str,
)
def test_packed_continuations_have_the_losses_they_have_alone(shape, packed):
    lengths = [(9, 3), (5, 1), (24, 7), (2, 1), (13, 12), (8, 4), (8, 2)]
    found = [Continuation(IDS[i : i + size + 1], count) for i, (size, count) in enumerate(lengths)]
    tokens = np.arange(CONFIG.vocab_size, dtype=np.int32)
    following = [Continuation(np.append(IDS[:5], token), 1) for token in tokens]
    found.append(following[np.argmin(alone(following))])
    assert packed_length(found, at_most=1000) == 128
    rows = ContinuationRows(found, packed_length(found, at_most=24), packed=packed)
    assert rows.num_rows == (4 if packed else 8)
    mesh = mesh_of(**shape)
    placed = jax.device_put(model(), sharding.shardings(model(), mesh))
    compute = dataclasses.replace(COMPUTE, split_tokens=mesh.shape["tensor"] > 1)
    batch_size = rows_a_batch(rows, mesh, 3) * mesh.shape["stage"]
    scored = score(
        placed,
        rows,
        mesh=mesh,
        run=token_scores(compute, mesh),
        batch_size=batch_size,
        num_batches=-(-rows.num_rows // batch_size),
        keep=True,
        show=lambda row: None,
    )
    nll, greedy = rows.sums(scored)
    np.testing.assert_allclose(nll, alone(found), rtol=0, atol=12 * TOLERANCE)
    assert CONFIG.vocab_size > 100
    # Of 131 random tokens none is the most probable.
    assert greedy.tolist() == [False] * len(lengths) + [True]
