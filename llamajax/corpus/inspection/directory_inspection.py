"""Inspect a prepared directory: what is in it, and what in it would harm a training."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.inspection.document_reader import MAX_DOCUMENT, DocumentReader, DocumentRun
from llamajax.corpus.inspection.document_survey import Survey
from llamajax.corpus.inspection.inspect_options import InspectOptions
from llamajax.corpus.inspection.ngram_overlap import NgramOverlap
from llamajax.data.packing import EXAMPLES, packing_facts
from llamajax.data.prepared_split import PreparedSplit, read_manifest
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer, load_tokenizer

# About so many bytes of text: of n-grams that are looked for, and of those by which documents are
# compared; but at least so many tokens.
_NGRAM_BYTES, _NGRAM_TOKENS = 50, 13
_SHINGLE_BYTES, _SHINGLE_TOKENS = 20, 5
# Of validation, and of all files of `against`, no more is looked for in train: all of each
# take up to 640 MB (measured).
_MAX_REFERENCE_TOKENS = 1 << 23
_FEW = 10  # tokens of the vocabulary that occur less often are hardly trained


def open_directory(directory: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Return manifest and tokenizer of a prepared directory. UserError for anything else."""
    manifest = read_manifest(directory, label="--inspect=")
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
    manifest, tokenizer = open_directory(options.directory)
    splits = manifest["splits"]
    sources = {n: PreparedSplit(options.directory, manifest, n) for n in splits}
    readers = {n: DocumentReader(source, tokenizer) for n, source in sources.items()}
    # Of instructions, bytes and tokens that carry loss.
    per_token = {n: s.stats["text_bytes"] / max(1, s.num_loss_tokens) for n, s in sources.items()}
    overlap = NgramOverlap(_tokens_of(_NGRAM_BYTES, _NGRAM_TOKENS, per_token["train"]))
    overlap.add_files(options.against, tokenizer, _MAX_REFERENCE_TOKENS)
    if "validation" in readers:
        limit = min(options.max_tokens or _MAX_REFERENCE_TOKENS, _MAX_REFERENCE_TOKENS)
        runs, count = readers["validation"].runs(limit), splits["validation"]["documents"]
        overlap.add_documents("validation", runs, count)
    shingle = _tokens_of(_SHINGLE_BYTES, _SHINGLE_TOKENS, per_token["train"])
    surveys, figures = {}, {}
    for name, reader in readers.items():
        watched = overlap if name == "train" else None
        surveys[name], found = _inspect_split(reader, options, shingle, watched, progress)
        stated = {"documents": splits[name]["documents"], "tokens": splits[name]["tokens"]}
        figures[name] = stated | {"bytes_per_token": per_token[name]} | found
        # What `prepare` counted in all of the split; nothing in a directory of an earlier version.
        counts = {"exact": splits[name].get("copies")}
        counts["exact_estimated"] = splits[name].get("copies_estimated")
        figures[name]["copies"] = counts | found["copies"]
    if "validation" in surveys:
        shared = np.isin(surveys["validation"].hashes, surveys["train"].hashes)
        figures["validation"]["copies"]["in_train"] = int(shared.sum())
    return {
        "directory": str(options.directory),
        "splits": figures,
        "ngram_tokens": overlap.n,
        **overlap.result(tokenizer),
        "left_out": [{"problem": text} for text in manifest.get("left_out", {}).get("first", [])],
    }


def _tokens_of(num_bytes: int, least: int, bytes_per_token: float) -> int:
    return max(least, round(num_bytes / max(1.0, bytes_per_token)))


def document_text(
    directory: Path, manifest: dict[str, Any], tokenizer: Tokenizer, *, token: int
) -> str:
    """Return the training document that holds a token of the stream, decoded, and where it is.

    Raises UserError for a token that is not there.
    """
    source = PreparedSplit(directory, manifest, "train")
    if token >= source.num_tokens:
        raise UserError(f"--at={token}: {directory} has train tokens 0 to {source.num_tokens - 1}")
    reader = DocumentReader(source, tokenizer)
    start, end = reader.document_at(token)
    text = reader.text(start, end, shown=MAX_DOCUMENT)
    return f"tokens {start} to {end - 1} of train, {end - start:,} in all:\n{text}"


def _inspect_split(
    reader: DocumentReader,
    options: InspectOptions,
    shingle: int,
    overlap: NgramOverlap | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Survey, dict[str, Any]]:
    """Read a split twice: count its tokens, then measure its documents."""
    source, tokenizer, seq_len, done = reader.source, reader.tokenizer, options.seq_len, 0
    total = 2 * min(source.num_tokens, options.max_tokens or source.num_tokens)

    def runs() -> Iterator[DocumentRun]:
        nonlocal done
        for run in reader.runs(options.max_tokens):
            yield run
            done += run.tokens.nbytes
            progress(f"inspecting {source.split}", done, total * run.tokens.itemsize)

    counts = sum(np.bincount(run.tokens, minlength=tokenizer.vocab_size) for run in runs())
    sizes = tokenizer.token_bytes(np.flatnonzero(counts).tolist())
    nll = np.where(sizes > 0, -np.log(np.maximum(counts, 1) / counts.sum()), 0.0)
    survey = Survey(nll, sizes, shingle)
    for run in runs():
        survey.add(run)
        if overlap:
            overlap.look(run)
    survey.finish()
    largest_first = np.sort(counts)[::-1]
    packing = {"seq_len": seq_len}
    if source.masked:
        packing |= packing_facts(source.examples, seq_len)
    else:
        packing |= survey.packing(seq_len)
        packing["unread_tokens"] = (source.num_tokens - 1) % seq_len
    return survey, {
        "read_documents": len(survey.lengths),
        "read_tokens": int(survey.lengths.sum()),
        "read_share": float(survey.lengths.sum() / source.num_tokens),
        "truncated_documents": survey.truncated,
        "lengths": survey.length_facts(),
        "packing": packing,
        "vocabulary": {
            "size": len(counts),
            f"less_than_{_FEW}_times": int(((counts > 0) & (counts < _FEW)).sum()),
            "make_up_99_percent": 1 + int((largest_first.cumsum() < 0.99 * counts.sum()).sum()),
        },
        **survey.copies(reader),
        "order": survey.order(),
        **survey.unlike(reader),
        "samples": [*_samples(reader, seq_len)],
    }


def _samples(reader: DocumentReader, seq_len: int) -> Iterator[dict[str, Any]]:
    """Yield the parts of documents in the first and the middle sample, decoded.

    Of training only the order of samples is another one.
    """
    masked, drawn = reader.source.masked, reader.source.samples(seq_len, EXAMPLES)
    for number in sorted({0, drawn.count // 2}):
        for first, size in drawn.pieces(number).tolist():
            # The last token of a window is shown with the next one.
            last = first + (size if masked else min(size, seq_len))
            tokens, starts = reader.read(first, last)
            for begin, end in itertools.pairwise(sorted({first, *starts.tolist(), last})):
                is_end = tokens[end - first - 1] == reader.tokenizer.eos_id
                yield {
                    "sample": number,
                    "at_token": begin,
                    "length": end - begin,
                    "begins": "document" if begin in starts else "within one",
                    "ends": "with it" if is_end else "cut",
                    "text": reader.text(begin, end),
                }
