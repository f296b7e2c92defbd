"""`prepare` as an array of tasks, on one machine or many: each tokenises its files, one merges.

    OUTPUT.parts/part-00002-of-00008/   what task 2 found: tokens, and four facts of each document
    OUTPUT.parts/tokenizer.model        of `train:N`: whoever comes first trains it, always the same

A task knows neither how many documents come before its own nor, with few documents, how long the
others are; so what is held out is decided when all parts are there. Merging copies tokens and
counts them. What it writes is, byte for byte, what one process would have written.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamajax.backends import lock_file
from llamajax.corpus.holdout import Holdout, Part
from llamajax.corpus.input_files import article_warnings
from llamajax.corpus.instructions import Example
from llamajax.corpus.preparation import (
    TRAINED,
    Progress,
    Settings,
    checked_input,
    corpus_of,
    train_on,
    unfinished,
    warn,
    watched,
    write_results,
    written,
)
from llamajax.corpus.tokenizer_training import parse_train
from llamajax.corpus.tokenizing import Tokens, tokenize, tokenize_all
from llamajax.data.shards import token_dtype
from llamajax.errors import UserError, combine
from llamajax.files import publish_directory, replaced_file, write_file
from llamajax.tokenizers.loading import load_tokenizer

_FACTS = "part.json"
_TOKENS, _ANSWER = "tokens.bin", "answer.bin"
# Of each document, int64: tokens with BOS and EOS, bytes of text, characters.
_COLUMNS = ("lengths.bin", "text_bytes.bin", "characters.bin")
# Documents that are merged at once: at most so many, or so many tokens.
_MERGED_DOCUMENTS = 1 << 16
_MERGED_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The files of one task: a run of them, so that documents keep their order."""

    index: int
    num_tasks: int
    files: list[Path]

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}-of-{self.num_tasks:05d}"


def parts_of(output: Path) -> Path:
    """Where the tasks of an output leave their parts."""
    return output.with_name(f"{output.name}.parts")


def share_out(files: list[Path], num_tasks: int) -> list[Task]:
    """The tasks, in order; a file belongs to that in whose share of the bytes its middle lies."""
    if num_tasks < 1:
        raise UserError(f"--num_tasks={num_tasks}: must be at least 1")
    sizes = [file.stat().st_size for file in files]
    total, before = max(1, sum(sizes)), 0
    shares: list[list[Path]] = [[] for _ in range(num_tasks)]
    for file, size in zip(files, sizes, strict=True):
        middle = before + size / 2
        shares[min(num_tasks - 1, int(num_tasks * middle / total))].append(file)
        before += size
    return [Task(index=i, num_tasks=num_tasks, files=own) for i, own in enumerate(shares)]


def ready_tokenizer(settings: Settings, files: list[Path], progress: Progress) -> None:
    """Train the tokenizer of `train:N` before any task asks for it."""
    parts = parts_of(settings.output)
    parts.mkdir(parents=True, exist_ok=True)
    _tokenizer(settings, files, parts, progress)


def run_task(settings: Settings, *, index: int, num_tasks: int, progress: Progress) -> str:
    """Do one task, unless it is done; what to say of it. UserError leaves nothing behind."""
    files = checked_input(settings)
    tasks = share_out(files, num_tasks)
    if not 0 <= index < num_tasks:
        raise UserError(f"--task_index={index}: must lie in 0..{num_tasks - 1} (--num_tasks)")
    task, parts = tasks[index], parts_of(settings.output)
    try:
        parts.mkdir(parents=True, exist_ok=True)
        path = _tokenizer(settings, files, parts, progress)
        wanted = _identity(settings, files, num_tasks, path)
        if not settings.overwrite and _is_done(parts / task.name, wanted):
            return f"{parts / task.name} is there already"
        with unfinished(parts / task.name) as directory:
            documents = _write_part(settings, task, directory, path, progress)
            facts = wanted | {"documents": documents, "files": [f.name for f in task.files]}
            (directory / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            publish_directory(directory, parts / task.name)
    except OSError as error:
        raise UserError(f"cannot write {parts}: {error.strerror or error}") from error
    return f"wrote {parts / task.name}: {documents:,} documents of {len(task.files)} files"


def merge(settings: Settings, *, num_tasks: int, progress: Progress) -> dict[str, Any]:
    """Make the output of all parts, and remove them; its manifest. UserError names what lacks."""
    files = checked_input(settings)
    tasks, parts = share_out(files, num_tasks), parts_of(settings.output)
    trained = parse_train(settings.tokenizer) is not None
    source = str(parts / TRAINED) if trained else settings.tokenizer
    missing = [t.index for t in tasks if not (parts / t.name / _FACTS).is_file()]
    if missing or (trained and not Path(source).is_file()):
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"{parts} lacks {len(missing)} of {num_tasks} parts; run them first: "
            f"--num_tasks={num_tasks} and --task_index of {shown or 0}"
        )
    wanted = _identity(settings, files, num_tasks, source)
    if problems := [str(e) for t in tasks if (e := _mismatch(parts / t.name, wanted))]:
        raise combine(problems, title="parts that are not of this command:")

    def write(directory: Path) -> dict[str, Any]:
        path = source
        if trained:
            path = str(shutil.copyfile(source, directory / TRAINED))
        results = _merged(settings, tasks, path, progress)
        return write_results(settings, results, directory, path)

    manifest = written(settings, files, write)
    warn(article_warnings(settings.clean, sum(len(_column(parts / t.name, 0)) for t in tasks)))
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def _tokenizer(settings: Settings, files: list[Path], parts: Path, progress: Progress) -> str:
    """Path of the tokenizer; `train:N` is trained by the first that comes, on the whole input."""
    if parse_train(settings.tokenizer) is None:
        return settings.tokenizer
    path = parts / TRAINED
    facts = parts / f"{TRAINED}.json"
    wanted = _input_of(settings, files) | {"tokenizer": settings.tokenizer}
    with (parts / f".{TRAINED}.lock").open("w") as lock:
        lock_file(lock, within_s=math.inf)  # the others wait; without locks they train the same
        if path.is_file() and facts.is_file():
            if json.loads(facts.read_text("utf-8")) != wanted:
                raise UserError(f"{path} was trained on another input; remove {parts}")
            return str(path)
        corpus = corpus_of(settings, files)
        documents = watched(corpus, "counting documents", progress)
        holdout = Holdout(documents, settings.validation_fraction)
        with replaced_file(path) as hidden:
            train_on(settings, corpus, holdout, hidden, progress)
        write_file(facts, json.dumps(wanted, indent=1))
    return str(path)


def _input_of(settings: Settings, files: list[Path]) -> dict[str, Any]:
    """What the bytes of all parts together depend on, but for the tokenizer."""
    names = ("format", "chat_template", "text_key", "clean", "validation_fraction")
    listed = [[file.name, file.stat().st_size] for file in files]
    return {name: getattr(settings, name) for name in names} | {"input": listed}


def _identity(
    settings: Settings, files: list[Path], num_tasks: int, tokenizer_path: str
) -> dict[str, Any]:
    fingerprint = load_tokenizer(tokenizer_path).fingerprint
    own = {"num_tasks": num_tasks, "tokenizer": fingerprint}
    return _input_of(settings, files) | own


def _mismatch(part: Path, wanted: dict[str, Any]) -> str | None:
    """How a finished part differs from what is wanted; None where it is what is wanted."""
    found = json.loads((part / _FACTS).read_text("utf-8"))
    others = [key for key, value in wanted.items() if found.get(key) != value]
    if not others:
        return None
    return f"{part} was made with another {' and '.join(others)}; remove it, or pass --overwrite"


def _is_done(part: Path, wanted: dict[str, Any]) -> bool:
    if not (part / _FACTS).is_file():
        return False
    if problem := _mismatch(part, wanted):
        raise UserError(problem)
    return True


def _text_bytes(document: str | Example) -> int:
    texts = [document] if isinstance(document, str) else document.answers
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def _write_part(
    settings: Settings, task: Task, directory: Path, tokenizer_path: str, progress: Progress
) -> int:
    """Tokens and facts of all documents of the task; how many there are."""
    corpus = corpus_of(settings, task.files)
    sizes: list[tuple[int, int]] = []

    def fed() -> Iterator[Part]:
        for document in watched(corpus, "tokenising", progress):
            sizes.append((_text_bytes(document), len(document)))
            yield Part("train", document)

    results = tokenize_all(
        fed(),
        tokenizer_path=tokenizer_path,
        template=settings.chat_template,
        num_workers=settings.workers,
    )
    lengths: list[int] = []
    names = (_TOKENS, _ANSWER) if settings.format == "instructions" else (_TOKENS,)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((directory / name).open("wb")) for name in names]
        stack.enter_context(contextlib.closing(results))
        for result in results:
            lengths += result.lengths
            for file, array in zip(files, (result.tokens, result.answer), strict=False):
                array.tofile(file)
    columns = (lengths, [size for size, _ in sizes], [length for _, length in sizes])
    for name, column in zip(_COLUMNS, columns, strict=True):
        np.array(column, "<i8").tofile(directory / name)
    return len(lengths)


class _Chunk(NamedTuple):
    """Documents of one part that follow each other; `first` is the number of the first in all."""

    first: int
    tokens: np.ndarray
    answer: np.ndarray | None
    lengths: np.ndarray
    text_bytes: np.ndarray


def _merged(
    settings: Settings, tasks: list[Task], tokenizer_path: str, progress: Progress
) -> Generator[Tokens]:
    """The tokens of all parts, split as one process would split them."""
    parts, masked = parts_of(settings.output), settings.format == "instructions"
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = token_dtype(tokenizer.vocab_size)
    sizes = (range(n) for task in tasks for n in _column(parts / task.name, 2))
    holdout = Holdout(sizes, settings.validation_fraction, whole=masked)
    held = holdout.held()
    total, done = sum(_size(parts / t.name) for t in tasks), 0
    for chunk in _chunks(parts, tasks, dtype, masked=masked):
        flags = np.fromiter(held, bool, len(chunk.lengths))
        cut = -1 if holdout.cut is None else holdout.cut - chunk.first
        if 0 <= cut < len(flags):
            whole = _document(settings, tasks, holdout.cut)
            yield from _parted(chunk, flags, slice(0, cut))
            yield from tokenize(holdout.halves(whole), tokenizer, settings.chat_template)
            yield from _parted(chunk, flags, slice(cut + 1, None))
        else:
            yield from _parted(chunk, flags, slice(None))
        done += chunk.tokens.nbytes
        progress("merging", done, total)


def _parted(chunk: _Chunk, held: np.ndarray, documents: slice) -> Iterator[Tokens]:
    """The chosen documents of a chunk, by split."""
    chosen = np.zeros(len(held), bool)
    chosen[documents] = True
    for split, flags in (("train", chosen & ~held), ("validation", chosen & held)):
        if flags.any():
            each = np.repeat(flags, chunk.lengths)
            yield Tokens(
                split,
                chunk.tokens[each],
                None if chunk.answer is None else chunk.answer[each],
                chunk.lengths[flags].tolist(),
                int(chunk.text_bytes[flags].sum()),
            )


def _chunks(parts: Path, tasks: list[Task], dtype: np.dtype, *, masked: bool) -> Iterator[_Chunk]:
    before = 0
    for task in tasks:
        part = parts / task.name
        lengths, text_bytes, _ = (_column(part, i) for i in range(len(_COLUMNS)))
        ends = np.cumsum(lengths)
        if (ends[-1] if len(ends) else 0) * dtype.itemsize != _size(part):
            raise UserError(f"{part / _TOKENS} was cut short; remove {part} and run its task again")
        first, start = 0, 0
        with (part / _TOKENS).open("rb") as tokens, _opened(part, masked=masked) as answers:
            while first < len(ends):
                last = int(np.searchsorted(ends, start + _MERGED_TOKENS))
                last = min(max(last, first + 1), first + _MERGED_DOCUMENTS, len(ends))
                count = int(ends[last - 1]) - start
                yield _Chunk(
                    before + first,
                    np.fromfile(tokens, dtype, count),
                    np.fromfile(answers, bool, count) if answers else None,
                    lengths[first:last],
                    text_bytes[first:last],
                )
                first, start = last, start + count
        before += len(ends)


def _opened(part: Path, *, masked: bool) -> Any:
    return (part / _ANSWER).open("rb") if masked else contextlib.nullcontext()


def _column(part: Path, number: int) -> np.ndarray:
    return np.fromfile(part / _COLUMNS[number], "<i8")


def _size(part: Path) -> int:
    return (part / _TOKENS).stat().st_size


def _document(settings: Settings, tasks: Iterable[Task], number: int) -> Any:
    """The document of this number, read again."""
    for task in tasks:
        count = len(_column(parts_of(settings.output) / task.name, 0))
        if number < count:
            corpus = corpus_of(settings, task.files)
            return next(document for i, document in enumerate(corpus) if i == number)
        number -= count
    raise AssertionError("the number is one of all parts")
