"""`prepare` as an array of tasks, on one machine or many: each tokenizes its files, one merges.

    OUTPUT.parts/part-00002-of-00008/   of task 2: tokens, and three numbers for each document
    OUTPUT.parts/tokenizer.model        of `train:N`: the first task trains it, always the same

A task knows neither how many documents precede its own nor, with few documents, how long the
others are. So the merge decides what is held out. It copies tokens and counts them, and writes,
byte for byte, what one process would have written; only the manifest's `unsafe_cuts` may differ.
"""

import collections
import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamajax.corpus.documents import Corpus, LeftOut, warn_of_single_article
from llamajax.corpus.holdout import DocumentPart, Holdout
from llamajax.corpus.input_patterns import InputFile
from llamajax.corpus.preparation import (
    TRAINED,
    ReportProgress,
    check_input,
    choose_holdout,
    locked_output,
    open_corpus,
    train_on,
    watch,
    write_results,
)
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.corpus.tokenizer_training import parse_train
from llamajax.corpus.tokenizing import TokenizedDocuments, by_split, tokenize_all
from llamajax.data.shards import token_dtype
from llamajax.errors import UserError, combine
from llamajax.files import lock_file, replaced_file, write_file
from llamajax.tokenizers import Tokenizer, load_tokenizer

_FACTS = "part.json"
_TOKENS, _ANSWER = "tokens.bin", "answer.bin"
# One int64 for each document: tokens with BOS and EOS, bytes of text, characters.
_COLUMNS = ("lengths.bin", "text_bytes.bin", "characters.bin")
# Those that decide the bytes of a part.
_FLAGS = ("format", "chat_template", "validation_fraction", "on_error")
# The merge holds at most so many documents, or so many tokens, at a time.
_MERGED_DOCUMENTS = 1 << 16
_MERGED_TOKENS = 1 << 22


class PrepareTask(NamedTuple):
    """A run of the input files, so that documents keep their order, and where its part is."""

    part: Path
    files: list[InputFile]

    def record(self, name: str) -> Any:
        """Return what the finished part says of itself under a name."""
        return json.loads((self.part / _FACTS).read_text("utf-8"))[name]

    def column(self, number: int) -> np.ndarray:
        """Read one of _COLUMNS of the finished part."""
        return np.fromfile(self.part / _COLUMNS[number], "<i8")


def parts_of(options: PrepareOptions) -> Path:
    """Return the directory of the parts of an output."""
    return options.directory.with_name(f"{options.directory.name}.parts")


def share_out(options: PrepareOptions, files: list[InputFile]) -> list[PrepareTask]:
    """Divide the files among tasks: the middle byte of a file decides to which it belongs."""
    sizes = [file.size for file in files]
    total, before, num_tasks = max(1, sum(sizes)), 0, options.num_tasks
    names = (f"part-{i:05d}-of-{num_tasks:05d}" for i in range(num_tasks))
    tasks = [PrepareTask(parts_of(options) / name, []) for name in names]
    for file, size in zip(files, sizes, strict=True):
        middle = before + size / 2
        tasks[min(num_tasks - 1, int(num_tasks * middle / total))].files.append(file)
        before += size
    return tasks


def run_task(options: PrepareOptions, progress: ReportProgress) -> str:
    """Do one task, unless it is done. Return a line for the user. UserError leaves nothing behind.

    UserError too if the part is there, but of another input or other flags.
    """
    files, tokenizer = check_input(options)
    part, own_files = share_out(options, files)[options.task_index]
    path = find_or_train_tokenizer(options, files, progress)
    tokenizer = tokenizer or load_tokenizer(path)
    facts = _facts(options, files, num_tasks=options.num_tasks, tokenizer=tokenizer.fingerprint)
    if not options.overwrite and (part / _FACTS).is_file():
        if problem := _mismatch(part, facts):
            raise UserError(problem)
        return f"{part} is there already"
    with locked_output(part) as directory:
        columns, corpus = _write_part(options, own_files, directory, tokenizer, progress)
        num_documents, left_out = len(columns[0]), corpus.left_out
        facts |= {"documents": num_documents, "files": [f.path.name for f in own_files]}
        facts |= {"left_out": left_out.record(), "declared": corpus.declared}
        (directory / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    left_out.say()
    return f"wrote {part}: {num_documents:,} documents of {len(own_files)} files"


def merge(options: PrepareOptions, progress: ReportProgress) -> dict[str, Any]:
    """Write the output from all parts, remove them, and return the manifest.

    Raises UserError that names missing parts and those of another input or other flags.
    """
    files, tokenizer = check_input(options)
    tasks, parts, num_tasks = share_out(options, files), parts_of(options), options.num_tasks
    trained = tokenizer is None
    tokenizer_path = str(parts / TRAINED) if trained else options.tokenizer
    missing = [i for i, task in enumerate(tasks) if not (task.part / _FACTS).is_file()]
    if missing or (trained and not Path(tokenizer_path).is_file()):
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"{parts} lacks {len(missing)} of {num_tasks} parts; run them first: "
            f"--num_tasks={num_tasks} and --task_index of {shown or 0}"
        )
    tokenizer = tokenizer or load_tokenizer(tokenizer_path)
    facts = _facts(options, files, num_tasks=num_tasks, tokenizer=tokenizer.fingerprint)
    if problems := [problem for task in tasks if (problem := _mismatch(task.part, facts))]:
        raise combine(problems, title="parts that are not of this command:")
    num_documents = sum(len(task.column(0)) for task in tasks)
    left_out = LeftOut()
    for task in tasks:
        left_out.merge(task.record("left_out"))
    with locked_output(options.directory) as directory:
        if trained:
            tokenizer = load_tokenizer(shutil.copyfile(tokenizer_path, directory / TRAINED))
        sizes = (int(n) for task in tasks for n in task.column(2))
        declared = [tuple(each) for task in tasks for each in task.record("declared")]
        holdout = choose_holdout(options, files, sizes, declared)
        results = _merged(options, tasks, tokenizer, holdout, progress)
        manifest = write_results(options, files, results, directory, tokenizer, left_out)
    warn_of_single_article(files, num_documents)
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def find_or_train_tokenizer(
    options: PrepareOptions, files: list[InputFile], progress: ReportProgress
) -> str:
    """Return the tokenizer's path. The first task trains `train:N`, on the whole input."""
    parts = parts_of(options)
    path, facts_path = parts / TRAINED, parts / f"{TRAINED}.json"
    facts = _facts(options, files, tokenizer=options.tokenizer)
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if parse_train(options.tokenizer) is None:
            return options.tokenizer
        with (parts / f".{TRAINED}.lock").open("w") as lock:
            lock_file(lock, within_s=math.inf)  # the others wait; without locks all train the same
            if path.is_file() and facts_path.is_file():
                if json.loads(facts_path.read_text("utf-8")) != facts:
                    raise UserError(f"{path} was trained on another input; remove {parts}")
                return str(path)
            corpus = open_corpus(options, files)
            watch(corpus, "checking documents", progress)
            holdout = choose_holdout(options, files, corpus.check(), corpus.declared)
            with replaced_file(path) as hidden:
                train_on(options, corpus, holdout, hidden, progress)
            write_file(facts_path, json.dumps(facts, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {parts}: {error.strerror or error}") from error
    return str(path)


def _facts(options: PrepareOptions, files: list[InputFile], **others: Any) -> dict[str, Any]:
    """Return what decides the bytes of the parts: flags, input files, and `others`."""
    facts = {name: getattr(options, name) for name in _FLAGS}
    return facts | {"input": [file.facts for file in files]} | others


def _mismatch(part: Path, facts: dict[str, Any]) -> str | None:
    """Return how a finished part differs from one with these facts; None if it does not."""
    found = json.loads((part / _FACTS).read_text("utf-8"))
    others = [key for key, value in facts.items() if found.get(key) != value]
    if not others:
        return None
    return f"{part} was made with another {' and '.join(others)}; remove it, or pass --overwrite"


def _write_part(
    options: PrepareOptions,
    files: list[InputFile],
    directory: Path,
    tokenizer: Tokenizer,
    progress: ReportProgress,
) -> tuple[tuple[list[int], ...], Corpus]:
    """Write the tokens and the columns of all documents in `files`; return columns and corpus."""
    corpus = open_corpus(options, files)
    watch(corpus, "checking documents", progress)
    columns: tuple[list[int], ...] = ([], [], list(corpus.check()))
    watch(corpus, "tokenizing", progress)
    parts = (DocumentPart("train", document) for document in corpus)
    results = tokenize_all(parts, tokenizer, options, corpus.left_out)
    names = (_TOKENS, _ANSWER) if options.has_examples else (_TOKENS,)
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context((directory / name).open("wb")) for name in names]
        stack.enter_context(contextlib.closing(results))
        for result in results:
            for column, new in zip(columns, (result.lengths, result.text_bytes), strict=False):
                if result.continues:
                    column[-1] += new[0]
                column.extend(new[result.continues :])
            for output, array in zip(outputs, (result.tokens, result.answer), strict=False):
                array.tofile(output)
    for name, column in zip(_COLUMNS, columns, strict=True):
        np.array(column, "<i8").tofile(directory / name)
    return columns, corpus


def _merged(
    options: PrepareOptions,
    tasks: list[PrepareTask],
    tokenizer: Tokenizer,
    holdout: Holdout,
    progress: ReportProgress,
) -> Generator[TokenizedDocuments]:
    """Yield the tokens of all parts, divided into splits as one process would.

    Raises UserError for a part that was cut short.
    """
    masked = options.has_examples
    dtype = token_dtype(tokenizer.vocab_size)
    held = holdout.held()
    total, done = sum((task.part / _TOKENS).stat().st_size for task in tasks), 0
    before = 0  # documents of earlier parts
    for task in tasks:
        path, lengths, text_bytes = task.part / _TOKENS, task.column(0), task.column(1)
        if lengths.sum() * dtype.itemsize != path.stat().st_size:
            raise UserError(f"{path} was cut short; remove {task.part} and run its task again")
        ends = np.concatenate(([0], np.cumsum(lengths)))
        cut = -1 if holdout.cut is None else holdout.cut - before
        for first, last in _chunks(ends, cut):
            flags = np.fromiter(held, bool, last - first)
            start, count = int(ends[first]), int(ends[last] - ends[first])
            if first == cut:
                again = open_corpus(options, task.files)
                collections.deque(again.check(), maxlen=0)  # which documents are left out
                documents = itertools.islice(again, cut, None)  # open while its text is read
                halves = holdout.halves(next(documents))
                yield from tokenize_all(halves, tokenizer, options, LeftOut())
            else:
                tokens = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
                answer = None
                if masked:
                    answer = np.fromfile(task.part / _ANSWER, bool, count, offset=start)
                some = slice(first, last)
                yield from by_split(flags, tokens, answer, lengths[some], text_bytes[some])
            done += count * dtype.itemsize
            progress("merging", done, total)
        before += len(lengths)


def _chunks(ends: np.ndarray, cut: int) -> Iterator[tuple[int, int]]:
    """Divide the documents of a part into ranges that fit into memory; `cut` is alone in one.

    ends: tokens before each document, and after the last.
    """
    first, num_documents = 0, len(ends) - 1
    while first < num_documents:
        last = int(np.searchsorted(ends, ends[first] + _MERGED_TOKENS))
        last = min(max(last, first + 1), first + _MERGED_DOCUMENTS, num_documents)
        if first <= cut < last:
            last = max(cut, first + 1)
        yield first, last
        first = last
