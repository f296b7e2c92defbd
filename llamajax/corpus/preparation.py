"""The work of `llamajax.prepare`: input files to a finished prepared directory, or nothing."""

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.documents import Corpus, LeftOut, Reading, warn_of_single_article
from llamajax.corpus.holdout import SPLITS, Holdout
from llamajax.corpus.input_files import find_files, format_of
from llamajax.corpus.instructions import InstructionCorpus
from llamajax.corpus.tokenizer_training import MAX_BYTES, parse_train, train_tokenizer
from llamajax.corpus.tokenizing import TokenizedDocuments, tokenize_all
from llamajax.data import shards
from llamajax.errors import TransientError, UserError, say
from llamajax.files import lock_file, replaced_directory
from llamajax.tokenizers import Tokenizer, load_tokenizer
from llamajax.tokenizers.chat import check_template, write_template
from llamajax.tokenizers.loading import MANIFEST

# File of a tokenizer that was trained on the input.
TRAINED = "tokenizer.model"
FORMATS = ("text", "instructions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """The flags of `prepare` that decide what is written, and with how many workers."""

    input: str
    tokenizer: str
    output: Path
    format: str
    chat_template: str
    reading: Reading
    validation_fraction: float
    workers: int
    overwrite: bool


# Called with the phase, the bytes done and all bytes.
ReportProgress = Callable[[str, int, int], None]


def prepare(settings: PrepareSettings, progress: ReportProgress) -> dict[str, Any]:
    """Write the output directory and return its manifest. A UserError leaves nothing behind."""
    files, tokenizer = check_input(settings)
    corpus = open_corpus(settings, files)
    masked = settings.format == "instructions"
    with locked_output(settings.output) as directory:
        watch(corpus, "checking documents", progress)
        sizes = corpus.check()
        holdout = Holdout(sizes, settings.validation_fraction, whole=masked)
        collections.deque(sizes, maxlen=0)  # name every bad row before any work is done
        if tokenizer is None:
            train_on(settings, corpus, holdout, directory / TRAINED, progress)
            tokenizer = load_tokenizer(directory / TRAINED)
        watch(corpus, "tokenizing", progress)
        results = tokenize_all(
            holdout.split(corpus),
            tokenizer,
            template=settings.chat_template,
            num_workers=settings.workers,
            left_out=corpus.left_out,
        )
        manifest = write_results(
            settings, files, results, directory, tokenizer, left_out=corpus.left_out
        )
    corpus.left_out.say()
    warn_of_single_article(settings.reading.clean, corpus.num_articles)
    return manifest


def check_input(settings: PrepareSettings) -> tuple[list[Path], Tokenizer | None]:
    """Return the files to prepare, and the tokenizer unless it is still to be trained.

    Raises UserError for what is wrong on the disk.
    """
    tokenizer = None
    if parse_train(settings.tokenizer) is None:
        tokenizer = load_tokenizer(settings.tokenizer)
        for line in tokenizer.warnings:
            say(f"warning: {line}")
    check_template(settings.chat_template, tokenizer)
    files = find_files(settings.input)
    if settings.reading.document_separator and all(format_of(file) != ".txt" for file in files):
        raise UserError("--document_separator is for .txt files, and --input has none")
    output = settings.output
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty and not (output / MANIFEST).is_file():
        raise UserError(f"--output={output} exists and was not written by prepare; name another")
    if output.exists() and not is_empty and not settings.overwrite:
        raise UserError(f"--output={output} exists; pass --overwrite to replace it")
    return files, tokenizer


def open_corpus(settings: PrepareSettings, files: list[Path]) -> Corpus:
    """Return the documents of some of the files."""
    if settings.format == "instructions":
        return InstructionCorpus(files, settings.reading, template=settings.chat_template)
    return Corpus(files, settings.reading)


@contextlib.contextmanager
def locked_output(output: Path) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` when the block ends without an error.

    One process at a time: raises TransientError if another one writes it, UserError if the disk
    refuses.
    """
    lock_path = output.parent / f".{output.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            no_lock = lock_file(stack.enter_context(lock_path.open("w")), within_s=0)
        except BlockingIOError:
            raise TransientError(f"--output={output}: another prepare is writing it") from None
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        if no_lock:
            say(f"warning: --output={output} cannot be locked ({no_lock}): start no other there")
        stack.callback(lock_path.unlink, missing_ok=True)
        yield stack.enter_context(replaced_directory(output))


def watch(corpus: Corpus, phase: str, progress: ReportProgress) -> None:
    """Report the progress of the next iterations."""
    corpus.report = lambda: progress(phase, corpus.bytes_read, corpus.total_bytes)


def train_on(
    settings: PrepareSettings,
    corpus: Corpus,
    holdout: Holdout,
    output: Path,
    progress: ReportProgress,
) -> None:
    """Train the tokenizer that `train:N` asks for; it has the same bytes on every machine."""
    watch(corpus, "reading for the tokenizer", progress)
    parts = holdout.split(corpus)
    share = min(1.0, MAX_BYTES / max(1.0, corpus.expected_text_bytes))
    num_pieces = parse_train(settings.tokenizer)
    train_tokenizer(parts, num_pieces=num_pieces, share=share, output=output)


def write_results(
    settings: PrepareSettings,
    files: list[Path],
    results: Generator[TokenizedDocuments],
    directory: Path,
    tokenizer: Tokenizer,
    *,
    left_out: LeftOut,
) -> dict[str, Any]:
    """Write shards, tokenizer and manifest; return the manifest."""
    masked, read_with = settings.format == "instructions", settings.reading
    is_stored = tokenizer.file == directory / TRAINED
    stored = TRAINED if is_stored else tokenizer.save(directory)
    write_template(directory, tokenizer, settings.chat_template)
    splits = _write_splits(results, directory, tokenizer, masked=masked)
    if not splits:
        raise UserError(f"--input={settings.input}: no text in these files")
    if "train" not in splits or ("validation" not in splits and settings.validation_fraction):
        raise UserError(
            f"--input={settings.input}: too little text for two splits; add some, or pass"
            " --validation_fraction=0"
        )
    if masked:
        options = {"format": settings.format, "chat_template": settings.chat_template}
    else:
        options = {"text_key": read_with.text_key, "clean": read_with.clean}
    options["validation_fraction"] = settings.validation_fraction
    if read_with.document_separator:
        options["document_separator"] = read_with.document_separator
    manifest = {
        "format": "llamajax prepared tokens",
        "format_version": shards.MASKED_FORMAT_VERSION if masked else shards.FORMAT_VERSION,
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
        "input": options | {"files": [file.name for file in files]},
        **({"left_out": record} if (record := left_out.record()) else {}),
        "splits": splits,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_splits(
    results: Generator[TokenizedDocuments], directory: Path, tokenizer: Tokenizer, *, masked: bool
) -> dict[str, Any]:
    """Write the shards of all splits that have documents; return their part of the manifest."""
    size = tokenizer.vocab_size
    writers = {s: shards.SplitWriter(directory, s, size, masked=masked) for s in SPLITS}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        stack.enter_context(contextlib.closing(results))
        for r in results:
            writers[r.split].add(
                r.tokens,
                r.lengths,
                text_bytes=sum(r.text_bytes),
                answer=r.answer,
                continues=r.continues,
            )
        splits = {s: w.close() for s, w in writers.items() if w.documents}
    # Statistics of the targets: of an example only the tokens that carry loss were counted.
    train = writers["train"].counts
    for name, split in splits.items():
        counts = writers[name].counts
        total = max(1, counts.sum())
        p = counts[counts > 0] / total
        split["unigram_entropy"] = float(-(p * np.log(p)).sum())  # nats
        if name == "validation":  # mean -log p in nats; p: add-one smoothed share in train
            log_p = np.log(train + 1) - math.log(train.sum() + len(train))
            split["unigram_loss"] = float(-(counts * log_p).sum() / total)
    return splits
