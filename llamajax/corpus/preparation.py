"""The work of `llamajax.prepare`: input files in, a finished prepared directory out, or nothing."""

import collections
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.backends import lock_file
from llamajax.corpus.holdout import Holdout
from llamajax.corpus.input_files import Corpus, find_files
from llamajax.corpus.instructions import Example, InstructionCorpus
from llamajax.corpus.tokenizer_training import MAX_BYTES, parse_train, train_tokenizer
from llamajax.corpus.tokenizing import Tokens, tokenize_all
from llamajax.data import shards
from llamajax.errors import TransientError, UserError, say
from llamajax.files import publish_directory
from llamajax.tokenizers.chat import check_template, write_template
from llamajax.tokenizers.loading import MANIFEST, load_tokenizer
from llamajax.tokenizers.tokenizer import Tokenizer

# Name of a tokenizer that was trained on the input.
TRAINED = "tokenizer.model"
SPLITS = ("train", "validation")
FORMATS = ("text", "instructions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides about the content of a prepared directory, and how it is made."""

    input: str
    tokenizer: str
    output: Path
    format: str
    chat_template: str
    text_key: str
    clean: str
    validation_fraction: float
    workers: int
    overwrite: bool


# Called with the phase, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]


def prepare(settings: Settings, progress: Progress) -> dict[str, Any]:
    """The manifest of the directory written. Raises UserError, and leaves nothing behind then."""
    files = checked_input(settings)
    corpus = corpus_of(settings, files)
    return written(settings, files, lambda directory: _write(settings, corpus, directory, progress))


def checked_input(settings: Settings) -> list[Path]:
    """The files to prepare. Raises UserError for settings that cannot be carried out."""
    if not 0 <= settings.validation_fraction <= 0.5:
        raise UserError(f"--validation_fraction={settings.validation_fraction}: must lie in 0..0.5")
    if settings.workers < 1:
        raise UserError(f"--workers={settings.workers}: must be at least 1")
    _check_format(settings)
    num_pieces = parse_train(settings.tokenizer)
    tokenizer = load_tokenizer(settings.tokenizer) if num_pieces is None else None
    warn(() if tokenizer is None else tokenizer.warnings)
    check_template(settings.chat_template, tokenizer)
    files = find_files(settings.input)
    check_output(settings.output, overwrite=settings.overwrite)
    return files


def written(
    settings: Settings, files: list[Path], write: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of what `write` leaves in a hidden directory, which becomes the output."""
    try:
        with unfinished(settings.output) as directory:
            manifest = write(directory)
            manifest["input"] |= {"files": [f.name for f in files]}
            text = json.dumps(manifest, indent=2) + "\n"
            (directory / MANIFEST).write_text(text, encoding="utf-8")
            publish_directory(directory, settings.output)
    except OSError as error:
        raise UserError(f"cannot write {settings.output}: {error.strerror or error}") from error
    return manifest


def _check_format(settings: Settings) -> None:
    """Refuse flags that the format has no use for."""
    if settings.format == "instructions":
        of_text = {"text_key": "text", "clean": "none"}
        useless = [f"--{k}" for k, default in of_text.items() if getattr(settings, k) != default]
    else:
        useless = ["--chat_template"] if settings.chat_template != "none" else []
    if useless:
        raise UserError(f"--format={settings.format} has no use for {', '.join(useless)}")


def corpus_of(settings: Settings, files: list[Path]) -> Corpus:
    """The documents of some of the files."""
    if settings.format == "instructions":
        return InstructionCorpus(files, template=settings.chat_template)
    return Corpus(files, text_key=settings.text_key, clean=settings.clean)


def check_output(output: Path, *, overwrite: bool) -> None:
    """UserError where something is in the way."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not (output / MANIFEST).is_file():
        raise UserError(f"--output={output} exists and was not written by prepare; name another")
    if output.exists() and not overwrite:
        raise UserError(f"--output={output} exists; pass --overwrite to replace it")


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A hidden directory beside `output`, removed at the end unless it was published.

    Locked, so that what a killed run left is told from what a running one writes.
    """
    directory = output.parent / f".{output.name}.incomplete"
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_path = output.parent / f".{output.name}.lock"
    with lock_path.open("w") as lock:
        try:
            no_lock = lock_file(lock, within_s=0)
        except BlockingIOError:
            raise TransientError(f"--output={output}: another prepare is writing it") from None
        if no_lock:
            say(f"warning: --output={output} cannot be locked ({no_lock}): start no other there")
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _write(
    settings: Settings,
    corpus: Corpus,
    directory: Path,
    progress: Progress,
) -> dict[str, Any]:
    if settings.format == "instructions":  # every bad line is told before any work is done
        collections.deque(watched(corpus, "checking examples", progress), maxlen=0)
    documents = watched(corpus, "counting documents", progress)
    holdout = Holdout(documents, settings.validation_fraction)
    path = settings.tokenizer
    if parse_train(settings.tokenizer) is not None:
        path = str(directory / TRAINED)
        train_on(settings, corpus, holdout, Path(path), progress)
    results = tokenize_all(
        holdout.split(watched(corpus, "tokenising", progress)),
        tokenizer_path=path,
        template=settings.chat_template,
        num_workers=settings.workers,
    )
    manifest = write_results(settings, results, directory, path)
    warn(corpus.warnings)
    return manifest


def warn(lines: Iterable[str]) -> None:
    """Print warnings for the user."""
    for line in lines:
        say(f"warning: {line}")


def watched(corpus: Corpus, phase: str, progress: Progress) -> Iterator[str | Example]:
    """The documents, with progress told."""
    for document in corpus:
        yield document
        progress(phase, corpus.bytes_read, corpus.total_bytes)


def train_on(
    settings: Settings, corpus: Corpus, holdout: Holdout, output: Path, progress: Progress
) -> None:
    """Train the tokenizer that `train:N` asks for; the same bytes wherever it is done."""
    num_pieces = parse_train(settings.tokenizer)
    assert num_pieces is not None
    parts = holdout.split(watched(corpus, "reading for the tokenizer", progress))
    # Compressed English is about a quarter of its text.
    expected = corpus.total_bytes * (1 + 3 * corpus.compressed_share)
    share = min(1.0, MAX_BYTES / max(1.0, expected))
    train_tokenizer(parts, num_pieces=num_pieces, share=share, output=output)


def write_results(
    settings: Settings, results: Generator[Tokens], directory: Path, tokenizer_path: str
) -> dict[str, Any]:
    """Write shards and tokenizer; the manifest, which lacks the names of the input files."""
    masked = settings.format == "instructions"
    tokenizer = load_tokenizer(tokenizer_path)
    is_stored = Path(tokenizer_path) == directory / TRAINED
    stored = TRAINED if is_stored else tokenizer.save(directory)
    write_template(directory, tokenizer, settings.chat_template)
    splits = _write_splits(results, directory, tokenizer, masked=masked)
    _check_splits(splits, settings)
    version = shards.MASKED_FORMAT_VERSION if masked else shards.FORMAT_VERSION
    return {
        "format": "llamajax prepared tokens",
        "format_version": version,
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": stored,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "block_tokens": shards.BLOCK_TOKENS,
        "token_dtype": shards.token_dtype(tokenizer.vocab_size).str,
        **({"loss_mask": True} if masked else {}),
        "input": _input_facts(settings),
        "splits": splits,
    }


def _input_facts(settings: Settings) -> dict[str, Any]:
    """How the input was read, for the manifest."""
    names = {"text": ("text_key", "clean"), "instructions": ("format", "chat_template")}
    wanted = (*names[settings.format], "validation_fraction")
    return {name: getattr(settings, name) for name in wanted}


def _write_splits(
    results: Generator[Tokens], directory: Path, tokenizer: Tokenizer, *, masked: bool
) -> dict[str, Any]:
    size = tokenizer.vocab_size
    writers = {s: shards.SplitWriter(directory, s, size, masked=masked) for s in SPLITS}
    try:
        with contextlib.closing(results):
            for r in results:
                writers[r.split].add(r.tokens, r.lengths, text_bytes=r.text_bytes, answer=r.answer)
                if not masked:  # the first token of a text is no target
                    first = r.tokens[np.cumsum([0, *r.lengths[:-1]])]
                    np.subtract.at(writers[r.split].counts, first, 1)
        splits = {s: w.close() for s, w in writers.items() if w.documents}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    # These are figures about targets: of an example only those that carry loss were counted.
    train = writers["train"].counts
    for name, split in splits.items():
        split["unigram_entropy"] = shards.unigram_entropy(writers[name].counts)
    if "validation" in splits:
        splits["validation"]["unigram_loss"] = shards.unigram_loss(
            writers["validation"].counts, train
        )
    return splits


def _check_splits(splits: dict[str, Any], settings: Settings) -> None:
    if not splits:
        raise UserError(f"--input={settings.input}: no text in these files")
    if "train" not in splits or ("validation" not in splits and settings.validation_fraction):
        raise UserError(
            f"--input={settings.input}: too little text for two splits; add some, or pass"
            " --validation_fraction=0"
        )
