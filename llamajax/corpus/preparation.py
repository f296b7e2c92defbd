"""The work of `llamajax.prepare`: input files to a finished prepared directory, or nothing."""

import collections
import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import CopyCounter
from llamajax.corpus.documents import Corpus, LeftOut, warn_of_single_article
from llamajax.corpus.holdout import SPLITS, Holdout
from llamajax.corpus.input_files import TOKEN_FORMATS, format_of
from llamajax.corpus.input_patterns import InputFile, declares_validation, find_inputs, records_of
from llamajax.corpus.instructions import InstructionCorpus
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.corpus.token_files import TokenCorpus, check_token_flags
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
# Called with the phase, the bytes done and all bytes.
ReportProgress = Callable[[str, int, int], None]


def prepare(options: PrepareOptions, progress: ReportProgress) -> dict[str, Any]:
    """Write the output directory and return its manifest. A UserError leaves nothing behind."""
    files, tokenizer = check_input(options)
    is_text = format_of(files[0].path) not in TOKEN_FORMATS
    corpus = open_corpus(options, files) if is_text else TokenCorpus(files, tokenizer)
    with locked_output(options.directory) as directory:
        watch(corpus, "checking documents", progress)
        holdout = choose_holdout(options, files, corpus.check(), corpus.declared)
        if tokenizer is None:
            tokenizer = train_on(options, corpus, holdout, directory / TRAINED, progress)
        watch(corpus, "tokenizing", progress)
        if is_text:
            results = tokenize_all(holdout.split(corpus), tokenizer, options, corpus.left_out)
        else:
            results = corpus.split(holdout)
        manifest = write_results(options, files, results, directory, tokenizer, corpus.left_out)
    warn_of_single_article(files, corpus.num_articles)
    return manifest


def check_input(options: PrepareOptions) -> tuple[list[InputFile], Tokenizer | None]:
    """Return the files to prepare, and the tokenizer unless it is still to be trained.

    Raises UserError for what is wrong on the disk.
    """
    tokenizer = None
    if parse_train(options.tokenizer) is None:
        tokenizer = load_tokenizer(options.tokenizer)
        for line in tokenizer.warnings:
            say(f"warning: {line}")
    check_template(options.chat_template, tokenizer)
    files = find_inputs(options)
    if declares_validation(files):
        say("note: validation is what --input declares; --validation_fraction is not used")
    check_token_flags(options, files)
    if options.document_separator and all(format_of(file.path) != ".txt" for file in files):
        raise UserError("--document_separator is for .txt files, and --input has none")
    output = options.directory
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty and not (output / MANIFEST).is_file():
        raise UserError(f"--output={output} exists and was not written by prepare; name another")
    if output.exists() and not is_empty and not options.overwrite:
        raise UserError(f"--output={output} exists; pass --overwrite to replace it")
    return files, tokenizer


def open_corpus(options: PrepareOptions, files: list[InputFile]) -> Corpus:
    """Return the documents of some of the files."""
    return (InstructionCorpus if options.has_examples else Corpus)(files, options)


def choose_holdout(
    options: PrepareOptions,
    files: list[InputFile],
    sizes: Iterator[int],
    declared: list[tuple[str, int]],
) -> Holdout:
    """Choose the documents that are held out.

    sizes, declared: as of `Corpus.check` and `Corpus.declared`.
    """
    if declares_validation(files):
        holdout = Holdout((), 0.0, declared=declared)
    else:
        holdout = Holdout(sizes, options.validation_fraction, whole=options.has_examples)
    collections.deque(sizes, maxlen=0)  # every bad row is named before any work is done
    return holdout


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
    options: PrepareOptions,
    corpus: Corpus,
    holdout: Holdout,
    output: Path,
    progress: ReportProgress,
) -> Tokenizer:
    """Train the tokenizer that `train:N` asks for; it has the same bytes on every machine."""
    watch(corpus, "reading for the tokenizer", progress)
    parts = holdout.split(corpus)
    share = min(1.0, MAX_BYTES / max(1.0, corpus.expected_text_bytes))
    num_pieces = parse_train(options.tokenizer)
    train_tokenizer(parts, num_pieces=num_pieces, share=share, output=output)
    return load_tokenizer(output)


def write_results(
    options: PrepareOptions,
    files: list[InputFile],
    results: Generator[TokenizedDocuments],
    directory: Path,
    tokenizer: Tokenizer,
    left_out: LeftOut,
) -> dict[str, Any]:
    """Write shards, tokenizer and manifest; say what was left out; return the manifest."""
    masked = options.has_examples
    is_stored = tokenizer.file == directory / TRAINED
    stored = TRAINED if is_stored else tokenizer.save(directory)
    write_template(directory, tokenizer, options.chat_template)
    splits = _write_splits(results, directory, tokenizer, masked=masked)
    left_out.say()
    if not splits:
        raise UserError(f"--input={options.input}: no text in these files")
    declared = declares_validation(files)
    if declared and len(splits) < len(SPLITS):
        (empty,) = set(SPLITS) - set(splits)
        raise UserError(f"--input={options.input}: no text in the files of the split {empty}")
    if "train" not in splits or ("validation" not in splits and options.validation_fraction):
        raise UserError(
            f"--input={options.input}: too little text for two splits; add some, or pass"
            " --validation_fraction=0"
        )
    names = ("format", "chat_template") if masked else ("text_key", "clean")
    is_tokens = format_of(files[0].path) in TOKEN_FORMATS
    names = () if is_tokens else names
    names += () if declared else ("validation_fraction",)
    names += ("document_separator",) if options.document_separator else ()
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
        "input": ({"format": "tokens"} if is_tokens else {})
        | {name: getattr(options, name) for name in names}
        | {"files": [file.path.name for file in files]}
        | ({"inputs": inputs} if (inputs := records_of(files)) else {}),
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
    copies = {s: CopyCounter() for s in SPLITS}
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abandon)
        stack.enter_context(contextlib.closing(results))
        for r in results:
            copies[r.split].add(r.tokens, r.lengths, continues=r.continues)
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
        split["used_tokens"] = int((counts > 0).sum())
        split["copies"] = copies[name].copies()
        split["copies_estimated"] = copies[name].bits > 0
        p = counts[counts > 0] / total
        split["unigram_entropy"] = float(-(p * np.log(p)).sum())  # nats
        if name == "validation":  # mean -log p in nats; p: add-one smoothed share in train
            log_p = np.log(train + 1) - math.log(train.sum() + len(train))
            split["unigram_loss"] = float(-(counts * log_p).sum() / total)
    return splits
