"""Multiple-choice tasks: JSON lines of questions, checked, encoded, and their figures.

A task is a file, and named like it without extensions. A choice is scored as a *continuation* of
its question: the tokens of both together, of which those of the choice are targets.
"""

import dataclasses
import hashlib
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamajax.corpus.input_files import json_object, read_numbered_lines
from llamajax.errors import UserError, combine
from llamajax.evaluation.continuations import Continuation
from llamajax.tokenizers import Tokenizer

# Spellings of the three keys: ours first, then those of well-known data sets.
_QUESTION = ("question", "context", "ctx", "prompt", "query", "goal")
_CHOICES = ("choices", "endings", "options")
_ANSWER = ("answer", "answerKey", "label", "gold")
_LISTED = 10  # problems of a file that are named


class Question(NamedTuple):
    """One row of a task. answer: index of the right choice. line: in the file, from 1."""

    text: str
    choices: tuple[str, ...]
    answer: int
    line: int

    def continuation(self, choice: str) -> str:
        """Return what follows the question: the choice after a space, unless one is there."""
        is_apart = not self.text or self.text[-1].isspace() or choice[0].isspace()
        return choice if is_apart else f" {choice}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """The questions of some tasks, and the continuations of all their choices in order."""

    questions: Mapping[str, Sequence[Question]]
    encoded: Sequence[Continuation]

    @property
    def digest(self) -> str:
        """A digest of what is scored, for comparison between processes."""
        known = hashlib.sha256(repr([*self.questions.items()]).encode())
        for each in self.encoded:
            known.update(each.ids.tobytes())
        return known.hexdigest()[:12]

    def warnings(self) -> Iterator[str]:
        """Yield a line for each task with questions whose beginnings are left out."""
        for name, figures in self.results(np.zeros(len(self.encoded))).items():
            if figures["truncated"]:
                yield (
                    f"task {name}: {figures['truncated']} of {figures['questions']} questions are "
                    "longer than the context; their first tokens are left out"
                )

    def results(self, nll: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return the figures of each task, given the loss of each choice in nats.

        accuracy: share of the questions whose right choice has the least loss; by_length: the least
        loss per byte of the choice in UTF-8. Of equals the first counts. loss (nats per token) and
        bits_per_byte: of the right choices. A question with a loss that is not finite counts as
        answered wrongly.
        """
        found, start = {}, 0
        for name, questions in self.questions.items():
            hits, hits_by_length, num_cut = 0, 0, 0
            right_nll, num_bytes, tokens = 0.0, 0, 0
            for question in questions:
                here, answer = slice(start, start + len(question.choices)), question.answer
                start = here.stop
                sizes = np.array([len(choice.encode()) for choice in question.choices])
                is_scored = bool(np.isfinite(nll[here]).all())  # argmin would choose the NaN
                hits += is_scored and int(np.argmin(nll[here])) == answer
                hits_by_length += is_scored and int(np.argmin(nll[here] / sizes)) == answer
                right_nll += float(nll[here][answer])
                num_bytes += int(sizes[answer])
                tokens += self.encoded[here][answer].num_targets
                num_cut += any(choice.is_cut for choice in self.encoded[here])
            count, accuracy = len(questions), hits / len(questions)
            found[name] = {
                "questions": count,
                "accuracy": accuracy,
                "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1)),
                "accuracy_by_length": hits_by_length / count,
                "bits_per_byte": right_nll / math.log(2) / num_bytes,
                "loss": right_nll / tokens,
                "tokens": tokens,
                "bytes": num_bytes,
                "truncated": num_cut,
            }
        return found


def open_tasks(paths: Sequence[str], tokenizer: Tokenizer, *, seq_len: int, label: str) -> Tasks:
    """Read and encode the tasks of these files; inputs are cut to the last `seq_len` tokens.

    label: of the flag or config key, for messages. Raises UserError that names file and lines.
    """
    questions: dict[str, list[Question]] = {}
    encoded = []
    for path in map(Path, paths):
        name = path.name.partition(".")[0]
        if name in questions:
            raise UserError(f"{label}: two files are called {name}, which names a task; rename one")
        questions[name] = _read(path, label)
        problems = []
        for question in questions[name]:
            for choice in question.choices:
                text = question.continuation(choice)
                ids, count = encode_continuation(tokenizer, question.text, text)
                if not 1 <= count <= seq_len:
                    problems.append(
                        f"line {question.line}: the choice {choice[:40]!r} has {count} tokens of "
                        f"its own; it must have between 1 and {seq_len}, the context"
                    )
                kept = np.array(ids[-(seq_len + 1) :], np.int32)
                encoded.append(Continuation(kept, count, len(ids) > len(kept)))
        _refuse(problems, path, label)
    if not questions:
        raise UserError(f"{label}: names no file")
    return Tasks(questions=questions, encoded=encoded)


def encode_continuation(tokenizer: Tokenizer, context: str, text: str) -> tuple[list[int], int]:
    """Return the ids of a context and its continuation, and how many belong to the continuation.

    As EleutherAI's lm-evaluation-harness 0.4.13 does it: white space at the end of the context
    counts for the continuation; both are encoded together, and the continuation is what follows as
    many tokens as the context alone has. BOS comes first where texts of the tokenizer begin with
    it; before a continuation without context also where they don't, or EOS where there is no BOS.
    """
    bare, first = context.rstrip(), tokenizer.start_ids
    together = tokenizer.encode(bare + context[len(bare) :] + text)
    if not bare and not first:
        first = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    return [*first, *together], len(together) - len(tokenizer.encode(bare) if bare else ())


def _read(path: Path, label: str) -> list[Question]:
    try:
        lines = read_numbered_lines(path)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    questions, problems = [], []
    for number, line in lines:
        try:
            questions.append(_question(json_object(line), number))
        except UserError as error:
            problems.append(f"line {number}: {error}")
    _refuse(problems, path, label)
    if not questions:
        raise UserError(f"{label}: {path}: holds no question; write one JSON object a line")
    return questions


def _refuse(problems: Sequence[str], path: Path, label: str) -> None:
    if problems:
        raise combine(problems, title=f"{label}: {path} cannot be used:", listed=_LISTED)


def _question(row: Mapping[str, Any], line: int) -> Question:
    text, choices, labels = _value(row, _QUESTION), _value(row, _CHOICES), None
    if isinstance(choices, dict):  # as in ARC: {"text": [...], "label": [...]}
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(text, str):
        raise UserError(f"the question must be a text, not {text!r}")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"the choices must be a list of at least two texts, not {choices!r}")
    if wrong := [c for c in choices if not isinstance(c, str) or not c.strip()]:
        raise UserError(f"each choice must be a text that is not empty, not {wrong[0]!r}")
    return Question(text, tuple(choices), _index(_value(row, _ANSWER), choices, labels), line)


def _value(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    given = [name for name in names if name in row]
    if len(given) != 1:
        what = f"has {' and '.join(given)}, keep one" if given else f"has no {names[0]}"
        raise UserError(f"{what} (any of {', '.join(names)})")
    return row[given[0]]


def _index(answer: Any, choices: list[str], labels: Any) -> int:
    """Return which choice an answer names: by its label, where the choices have labels.

    Else by index from 0, letter from A, or its text.
    """
    found, indices, fix = set(), range(len(choices)), "give the index of one, from 0"
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != len(choices):
            raise UserError(f"the choices must have a label each, not {labels!r}")
        # ARC has numbers as labels in some rows, and data sets differ in how they write them.
        name, fix = str(answer).strip(), f"give one of the labels {labels}"
        found = {i for i in indices if str(labels[i]).strip() == name}
    elif isinstance(answer, str):
        name, letters = answer.strip(), string.ascii_uppercase
        found = {i for i in indices if answer == choices[i] or name in (str(i), letters[i : i + 1])}
    elif isinstance(answer, int) and not isinstance(answer, bool):
        found = {i for i in indices if i == answer}
    if len(found) != 1:
        what = f"choices {sorted(found)}" if found else f"none of {len(choices)} choices"
        raise UserError(f"the answer {answer!r} names {what}; {fix}")
    return found.pop()
