"""Inspect a prepared directory: what is in it, and what in it would harm a training."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.inspection.document_reader import MAX_DOCUMENT, DocumentReader, DocumentRun
from llamajax.corpus.inspection.document_survey import Survey
from llamajax.corpus.inspection.inspect_options import InspectOptions
from llamajax.corpus.inspection.ngram_overlap import NgramOverlap, reference_rows
from llamajax.data import shards
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer, load_tokenizer

# About so many bytes of text: of n-grams that are looked for, and of those by which documents are
# compared; but at least so many tokens.
_NGRAM_BYTES, _NGRAM_TOKENS = 50, 13
_SHINGLE_BYTES, _SHINGLE_TOKENS = 20, 5
# Of the validation split less is read: every n-gram of it is kept, 16 bytes each.
_MAX_VALIDATION_TOKENS = 1 << 24
_FEW = 10  # tokens of the vocabulary that occur less often are hardly trained


def open_directory(directory: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Return manifest and tokenizer of a prepared directory. UserError for anything else."""
    manifest = shards.read_manifest(directory)
    if lacking := [key for key in ("tokenizer", "input", "splits") if key not in manifest]:
        raise UserError(
            f"{directory}: its manifest lacks {', '.join(lacking)}: damaged or not written by "
            "llamajax.prepare"
        )
    return manifest, load_tokenizer(directory)


def inspect(options: InspectOptions, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Return all figures of a prepared directory, as a JSON object.

    Raises UserError for a directory that is none, or a file of `against` that cannot be read.
    """
    directory = options.directory
    manifest, tokenizer = open_directory(directory)
    readers = {
        name: DocumentReader(directory, manifest, name, tokenizer) for name in manifest["splits"]
    }
    ratio = max(1.0, _bytes_per_token(manifest["splits"]["train"]))
    overlap = NgramOverlap(max(_NGRAM_TOKENS, round(_NGRAM_BYTES / ratio)))
    _add_references(overlap, options, readers, tokenizer)
    shingle = max(_SHINGLE_TOKENS, round(_SHINGLE_BYTES / ratio))
    surveys, splits = {}, {}
    for name, reader in readers.items():
        look = overlap.look if name == "train" else None
        survey, splits[name] = _inspect_split(reader, options, shingle, look, progress)
        splits[name] = {
            "documents": manifest["splits"][name]["documents"],
            "tokens": reader.num_tokens,
            "bytes_per_token": _bytes_per_token(manifest["splits"][name]),
            **splits[name],
        }
        surveys[name] = survey
    if "validation" in surveys:
        shared = np.isin(surveys["validation"].hashes, surveys["train"].hashes)
        splits["validation"]["copies_of_train"] = int(shared.sum())
    return {
        "directory": str(directory),
        "left_out": manifest.get("left_out", {}),
        "splits": splits,
        "overlap": {"ngram_tokens": overlap.n, "references": overlap.result(tokenizer)},
    }


def document_text(
    directory: Path, manifest: dict[str, Any], tokenizer: Tokenizer, *, token: int
) -> str:
    """Return the training document that holds a token of the stream, decoded, and where it is.

    Raises UserError for a token that is not there.
    """
    reader = DocumentReader(directory, manifest, "train", tokenizer)
    if token >= reader.num_tokens:
        raise UserError(f"--at={token}: {directory} has train tokens 0 to {reader.num_tokens - 1}")
    start, end = reader.document_at(token)
    text = reader.text(start, end, shown=MAX_DOCUMENT)
    return f"tokens {start} to {end - 1} of train, {end - start:,} in all:\n{text}"


def _bytes_per_token(stats: dict[str, Any]) -> float:
    """Return bytes of text for each token; of instructions, of those that carry loss."""
    return stats["text_bytes"] / max(1, stats.get("loss_tokens", stats["tokens"]))


def _add_references(
    overlap: NgramOverlap,
    options: InspectOptions,
    readers: dict[str, DocumentReader],
    tokenizer: Tokenizer,
) -> None:
    """Add the texts that are looked for in the training data."""
    for name in options.against:
        for place, texts in reference_rows(Path(name)):
            overlap.add(name, place, [tokenizer.encode_array(text) for text in texts])
    if "validation" in readers:
        limit = min(options.max_tokens or _MAX_VALIDATION_TOKENS, _MAX_VALIDATION_TOKENS)
        for run in readers["validation"].runs(limit):
            documents = np.split(run.tokens, run.offsets[1:])
            for start, tokens in zip(run.starts.tolist(), documents, strict=True):
                overlap.add("validation", f"validation token {start}", [tokens])
    overlap.freeze()


def _inspect_split(
    reader: DocumentReader,
    options: InspectOptions,
    shingle: int,
    look: Callable[[DocumentRun], None] | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Survey, dict[str, Any]]:
    """Read a split twice: count its tokens, then measure its documents."""
    tokenizer, done = reader.tokenizer, 0
    total = 2 * min(reader.num_tokens, options.max_tokens or reader.num_tokens)

    def runs(phase: str) -> Iterator[DocumentRun]:
        nonlocal done
        for run in reader.runs(options.max_tokens):
            yield run
            done += run.tokens.nbytes
            progress(f"{phase} {reader.split}", done, total * run.tokens.itemsize)

    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for run in runs("inspecting"):
        counts += np.bincount(run.tokens, minlength=len(counts))
    sizes = _token_bytes(tokenizer, counts)
    nll = np.where(sizes > 0, -np.log(np.maximum(counts, 1) / max(1, counts.sum())), 0.0)
    survey = Survey(nll, sizes, shingle)
    for run in runs("inspecting"):
        survey.add(run)
        if look:
            look(run)
    survey.finish()
    return survey, {
        "read_documents": len(survey.lengths),
        "read_tokens": int(survey.lengths.sum()),
        "complete": int(survey.lengths.sum()) == reader.num_tokens,
        "truncated_documents": survey.truncated,
        "lengths": survey.length_facts(),
        "packing": survey.packing(options.seq_len)
        | {"unread_tokens": (reader.num_tokens - 1) % options.seq_len},
        "vocabulary": _vocabulary(tokenizer, counts),
        "duplicates": survey.duplicates(reader),
        "order": survey.order.result(),
        "outliers": survey.outliers(reader),
        "samples": [*_samples(reader, options.seq_len)],
    }


def _token_bytes(tokenizer: Tokenizer, counts: np.ndarray) -> np.ndarray:
    """Return the bytes of text of each token that occurs, within a text; a part of a character
    counts as one byte.
    """
    sizes = np.zeros(len(counts), np.int64)
    before = tokenizer.encode("a")
    known = len(tokenizer.decode(before))
    for token in np.flatnonzero(counts).tolist():
        text = tokenizer.decode([*before, token])[known:]
        sizes[token] = len(text.encode("utf-8", "replace")) - 2 * text.count("\ufffd")
    return sizes


def _vocabulary(tokenizer: Tokenizer, counts: np.ndarray) -> dict[str, Any]:
    order = np.argsort(-counts, kind="stable")
    cumulative = np.cumsum(counts[order])
    total = int(cumulative[-1])
    return {
        "size": len(counts),
        "used": int((counts > 0).sum()),
        "rare": int(((counts > 0) & (counts < _FEW)).sum()),
        "cover_99_percent": int(np.searchsorted(cumulative, 0.99 * total)) + 1,
        "most_frequent": [
            {"id": int(i), "text": tokenizer.decode([i]), "share": float(counts[i] / total)}
            for i in order[:10]
        ],
    }


def _samples(reader: DocumentReader, seq_len: int) -> Iterator[dict[str, Any]]:
    """Yield samples of `seq_len` tokens: the documents in each, decoded."""
    count = (reader.num_tokens - 1) // seq_len
    for number in sorted({0, count // 2})[: max(1, count)]:
        first, last = number * seq_len, min((number + 1) * seq_len, reader.num_tokens)
        starts = reader.borders(first, last).tolist()
        borders = sorted({first, *starts, last})
        yield {
            "number": number,
            "parts": [
                {
                    "token": begin,
                    "length": end - begin,
                    "begins": begin in starts,
                    "ends": int(reader.tokens(end - 1, end)[0]) == reader.tokenizer.eos_id,
                    "text": reader.text(begin, end),
                }
                for begin, end in itertools.pairwise(borders)
            ],
        }
